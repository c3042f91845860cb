# SPDX-License-Identifier: Apache-2.0
"""An encoder-decoder transformer for translation, with named dimensions.

After Vaswani et al., "Attention Is All You Need" (arXiv:1706.03762), with the normalization before
each branch. The names ('embed', 'heads', ...) say what a dimension is, not where it is placed:
`config.sharding` maps them to mesh axes.

B: batch, S: source tokens, T: target tokens, C: tokens that fit in the cache, D: width, N: heads,
H: width of a head, V: vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_ACTIVATIONS = ('batch', 'length', 'embed')
KeyValue = tuple[jax.Array, jax.Array]
# Keys and values of the source for each layer of the decoder, and which tokens are real, (B, S).
Memory = tuple[tuple[KeyValue, ...], jax.Array]


class KeysValues(nn.Module):
    """What attention reads: a key and a value of each token for each head.

    Attributes:
        heads: number of heads; must divide the width.
        dtype: dtype of the computation; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    heads: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values, (B, T, N, H) each, for (B, T, D)."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def project(name: str) -> jax.Array:
            return _split_heads(
                _dense(x.shape[-1], ('embed', 'heads'), name, dtypes)(x), self.heads
            )

        return project('key'), project('value')


class Attention(nn.Module):
    """Multi-head attention: of tokens to each other, or to those of the source.

    Attributes:
        heads: number of heads; must divide the width.
        decode: whether to keep keys and values in the collection 'cache'.
        dtype: dtype of the computation; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    heads: int
    decode: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        is_real: jax.Array | None = None,
        positions: jax.Array | None = None,
        source: KeyValue | None = None,
    ) -> jax.Array:
        """Returns (B, T, D) for inputs of the same shape.

        Args:
            x: (B, T, D), which queries are made of; keys and values, too, without a source.
            is_real: bool (B, keys), False for keys that are padding; None if none is.
            positions: int (B or 1, T), where the inputs are in their sequence, to attend to those
                before; None to attend to all.
            source: keys and values of the source, (B, S, N, H) each.
        """
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width = x.shape[-1]
        query = _split_heads(_dense(width, ('embed', 'heads'), 'query', dtypes)(x), self.heads)
        key, value = source or KeysValues(self.heads, name='inputs', **dtypes)(x)
        # The caller of `encode` may have cast its result.
        key, value = key.astype(query.dtype), value.astype(query.dtype)
        if self.decode and source is None:
            key = self._update_cache('keys', key, positions)
            value = self._update_cache('values', value, positions)
        mask = None if is_real is None else is_real[:, None, None]
        if positions is not None:
            # What a cache does not have yet is after all queries, too.
            mask = (jnp.arange(key.shape[1]) <= positions[..., None])[:, None]
        # In float32, because bfloat16 probabilities would not sum to 1; then in the dtype of the
        # values again, which all later computation has.
        weights = nn.dot_product_attention_weights(
            query, key, mask=mask, force_fp32_for_softmax=True
        ).astype(value.dtype)
        y = jnp.einsum('bnts,bsnh->btnh', weights, value).reshape(x.shape)
        return _dense(width, ('heads', 'embed'), 'out', dtypes)(y)

    def _update_cache(self, name: str, new: jax.Array, positions: Any) -> jax.Array:
        """Writes (B, T, N, H) into the cache at `positions`; returns all of it, (B, C, N, H)."""
        # As long as the inputs of the call that creates it, which must leave it empty.
        cache = self.variable('cache', name, jnp.zeros, new.shape, new.dtype)
        if not self.is_initializing():
            rows = jnp.arange(new.shape[0])[:, None]
            # The parameters may have been cast after the cache was created. What is beyond the end
            # of the cache is dropped.
            update = new.astype(cache.value.dtype)
            cache.value = cache.value.at[rows, positions].set(update, mode='drop')
        return cache.value.astype(new.dtype)


class Layer(nn.Module):
    """Self-attention, attention to the source in a decoder, and an MLP: pre-norm and residual.

    Attributes:
        heads: number of attention heads; must divide the width.
        mlp_width: hidden units of the MLP.
        dropout_rate: probability of dropping an element of each branch's output in training.
        decode: see `Attention`.
        dtype: dtype of the computation; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    heads: int
    mlp_width: int
    dropout_rate: float = 0.0
    decode: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        is_real: jax.Array,
        *,
        positions: jax.Array | None = None,
        source: KeyValue | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Returns (B, T, D) for inputs of the same shape.

        Args:
            x: (B, T, D), in an encoder those of the source (T = S).
            is_real: bool (B, S), False for padding of the source.
            positions: int (B or 1, T), in a decoder; see `Attention`.
            source: in a decoder, keys and values of the source, (B, S, N, H) each.
            train: whether dropout is active.
        """
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)

        def add(x: jax.Array, branch: jax.Array) -> jax.Array:
            return nn.with_logical_constraint(x + dropout(branch), _ACTIVATIONS)

        y = _layer_norm('attention_norm', dtypes)(x)
        attention = Attention(self.heads, decode=self.decode, name='attention', **dtypes)
        if source is None:
            x = add(x, attention(y, is_real=is_real))
        else:
            x = add(x, attention(y, positions=positions))
            y = _layer_norm('source_norm', dtypes)(x)
            attention = Attention(self.heads, name='source_attention', **dtypes)
            x = add(x, attention(y, is_real=is_real, source=source))
        y = _layer_norm('mlp_norm', dtypes)(x)
        y = nn.relu(_dense(self.mlp_width, ('embed', 'mlp'), 'mlp_in', dtypes)(y))
        y = nn.with_logical_constraint(y, ('batch', 'length', 'mlp'))
        return add(x, _dense(x.shape[-1], ('mlp', 'embed'), 'mlp_out', dtypes)(y))


class Positions(nn.Module):
    """Counts the tokens of each row, in the collection 'cache' if there is one.

    Attributes:
        decode: whether a call continues the tokens of earlier calls.
    """

    decode: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the positions of tokens (B, T), int (B, T), or (1, T) if all rows have them."""
        batch, length = tokens.shape
        positions = jnp.arange(length)[None]
        if not self.decode:
            return positions
        index = self.variable('cache', 'index', jnp.zeros, (batch,), jnp.int32)
        positions = index.value[:, None] + positions
        # The call that creates the cache must not advance it.
        if not self.is_initializing():
            index.value = index.value + length
        return positions


class Translator(nn.Module):
    """Predicts the next token of a target, given a source and the target's tokens before it.

    Source, target and output share one table of embeddings, so they need one vocabulary. Padding of
    a target needs no mask, as it is after all other tokens.

    Attributes:
        vocab_size: number of tokens in the vocabulary.
        layers: number of layers of the encoder, and of the decoder.
        width: width of the residual stream; an even number.
        heads: number of attention heads; must divide the width.
        mlp_width: hidden units of each MLP; by default 4 x width.
        dropout_rate: dropout of the embeddings and of each branch in training.
        padding: the token after the end of a source, also one that is not in the vocabulary.
        decode: whether to cache keys and values of the target in the collection 'cache', so that
            each call of `extend` continues the tokens of the one before. The cache has as many
            tokens as the call that creates it.
        dtype: dtype of the computation, such as bfloat16; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    vocab_size: int
    layers: int = 6
    width: int = 512
    heads: int = 8
    mlp_width: int | None = None
    dropout_rate: float = 0.0
    padding: int = 0
    decode: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Raises ValueError for invalid options, before anything is traced."""
        if self.heads < 1 or self.width % self.heads or self.width % 2:
            raise ValueError(
                f'width={self.width}: expected an even number that heads={self.heads} divides'
            )
        super().__post_init__()

    def setup(self) -> None:
        """Creates the modules."""
        dtypes: Any = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        # With this deviation, logits of normalized vectors have one of about 1.
        deviation = self.width**-0.5
        init = _with_axes(nn.initializers.normal(deviation), 'vocab', 'embed')
        self.embed = nn.Embed(self.vocab_size, self.width, embedding_init=init, **dtypes)
        self.dropout = nn.Dropout(self.dropout_rate)
        options: Any = dict(
            heads=self.heads,
            mlp_width=self.mlp_width or 4 * self.width,
            dropout_rate=self.dropout_rate,
            **dtypes,
        )
        self.encoder = [Layer(**options) for _ in range(self.layers)]
        self.encoder_norm = _layer_norm(None, dtypes)
        self.memory = [KeysValues(self.heads, **dtypes) for _ in range(self.layers)]
        self.positions = Positions(self.decode)
        self.decoder = [Layer(decode=self.decode, **options) for _ in range(self.layers)]
        self.decoder_norm = _layer_norm(None, dtypes)

    def __call__(self, sources: jax.Array, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (B, T, V): those of the token after each of the inputs.

        Args:
            sources: tokens of the source, int (B, S).
            inputs: tokens of the target, int (B, T): a start token, and those after it.
            train: whether dropout is active.
        """
        return self.extend(inputs, self.encode(sources, train), train)

    def encode(self, sources: jax.Array, train: bool = False) -> Memory:
        """Returns what the decoder reads of the source tokens, int (B, S)."""
        is_real = sources != self.padding
        # Padding needs no embedding: that of a number that is no token is NaN.
        sources = jnp.where(is_real, sources, 0)
        x_BSD = self._embed(sources, jnp.arange(sources.shape[1])[None], train)
        for layer in self.encoder:
            x_BSD = layer(x_BSD, is_real, train=train)
        x_BSD = self.encoder_norm(x_BSD)
        # Once for each source, and not again for each token of the target.
        return tuple(each(x_BSD) for each in self.memory), is_real

    def extend(self, inputs: jax.Array, memory: Memory, train: bool = False) -> jax.Array:
        """Returns logits (B, T, V) of the token after each of the inputs, int (B, T).

        Args:
            inputs: tokens of the target; with a cache, those after the tokens of earlier calls.
            memory: the result of `encode`, of B sources.
            train: whether dropout is active.
        """
        sources, is_real = memory
        positions = self.positions(inputs)
        x_BTD = self._embed(inputs, positions, train)
        for layer, source in zip(self.decoder, sources, strict=True):
            x_BTD = layer(x_BTD, is_real, positions=positions, source=source, train=train)
        logits = self.embed.attend(self.decoder_norm(x_BTD))
        return nn.with_logical_constraint(logits, ('batch', 'length', 'vocab'))

    def _embed(self, tokens: jax.Array, positions: jax.Array, train: bool) -> jax.Array:
        # As large as the encodings of the positions.
        x = self.embed(tokens) * math.sqrt(self.width)
        x = x + encode_positions(positions, self.width).astype(x.dtype)
        x = self.dropout(x, deterministic=not train)
        return nn.with_logical_constraint(x, _ACTIVATIONS)


def encode_positions(positions: jax.Array, width: int) -> jax.Array:
    """Returns sines and cosines of positions (...), float32 (..., width); for any position.

    Their wave lengths are from 2 pi to 20,000 pi (Vaswani et al., section 3.5).
    """
    exponents = jnp.arange(width // 2) / (width // 2)
    angles = positions[..., None] / 10_000**exponents
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Returns (B, T, N, H) for (B, T, D)."""
    x = x.reshape(*x.shape[:2], heads, x.shape[-1] // heads)
    return nn.with_logical_constraint(x, ('batch', 'length', 'heads', 'head_dim'))


def _dense(width: int, axes: tuple[str, str], name: str, dtypes: dict[str, Any]) -> nn.Dense:
    init = _with_axes(nn.initializers.xavier_uniform(), *axes)
    return nn.Dense(width, kernel_init=init, name=name, **dtypes)


def _layer_norm(name: str | None, dtypes: dict[str, Any]) -> nn.LayerNorm:
    scale = _with_axes(nn.initializers.ones, 'embed')
    bias = _with_axes(nn.initializers.zeros, 'embed')
    return nn.LayerNorm(scale_init=scale, bias_init=bias, name=name, **dtypes)


def _with_axes(init: Callable[..., Any], *axes: str) -> Callable[..., Any]:
    return nn.with_logical_partitioning(init, axes)
