# SPDX-License-Identifier: Apache-2.0
"""A decoder-only transformer language model with named dimensions, written with NNX.

A suffix of a name says which dimensions an array has:

    B  sequences of a batch       N  attention heads
    L  tokens of a sequence       K  units of a head, D / N
    D  width of the model         M  hidden units of the MLP
    V  tokens of the vocabulary   C  keys: L, or the length of a cache
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

# Keys and values of a layer, (B, C, N, K) each.
KeysValues = tuple[jax.Array, jax.Array]


def rotate(x_BLNK: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates queries or keys by angles proportional to their positions (Su et al., 2021).

    The product of a query and a key then depends on the distance between their positions only.

    Args:
        x_BLNK: with an even number of units.
        positions: int (batch, length) or (1, length).

    Returns:
        An array of the shape and dtype of x_BLNK.
    """
    half = x_BLNK.shape[-1] // 2
    frequencies = 10_000.0 ** -(jnp.arange(half) / half)
    angles = (positions[..., None] * frequencies)[:, :, None]
    # In float32: half precision cannot tell large positions apart.
    a, b = jnp.split(x_BLNK.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BLNK.dtype)


def _with_axes(init: Any, *axes: str) -> Any:
    # Not eager: NNX would look for mesh axes of these names.
    return nnx.with_partitioning(init, axes, eager_sharding=False)


def _linear(sizes: tuple[int, int], axes: tuple[str, str], **options: Any) -> nnx.Linear:
    init = _with_axes(nnx.initializers.lecun_normal(), *axes)
    return nnx.Linear(*sizes, kernel_init=init, **options)


def _layer_norm(width: int, **options: Any) -> nnx.LayerNorm:
    scale = _with_axes(nnx.initializers.ones, 'embed')
    bias = _with_axes(nnx.initializers.zeros, 'embed')
    return nnx.LayerNorm(width, scale_init=scale, bias_init=bias, **options)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, *, rotary: bool, rngs: nnx.Rngs, **dtypes: Any):
        """Creates the parameters.

        Args:
            width: features of a token.
            heads: number of heads; must divide the width.
            rotary: whether queries and keys are rotated by their positions.
            rngs: random keys of the initial parameters.
            **dtypes: `dtype` and `param_dtype` of the layers.
        """
        self.heads = heads
        self.rotary = rotary
        options = dict(rngs=rngs, **dtypes)
        self.query = _linear((width, width), ('embed', 'heads'), **options)
        self.key = _linear((width, width), ('embed', 'heads'), **options)
        self.value = _linear((width, width), ('embed', 'heads'), **options)
        self.out = _linear((width, width), ('heads', 'embed'), **options)

    def __call__(
        self,
        x_BLD: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        cached: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Returns an array of the shape of the input, and keys and values; see `Block`."""
        batch, length, width = x_BLD.shape
        shape = (batch, length, self.heads, width // self.heads)
        q_BLNK, k_BLNK, v_BLNK = (
            layer(x_BLD).reshape(shape) for layer in (self.query, self.key, self.value)
        )
        if self.rotary:
            q_BLNK, k_BLNK = rotate(q_BLNK, positions), rotate(k_BLNK, positions)
        k_BCNK, v_BCNK = k_BLNK, v_BLNK
        if cached is not None:
            k_BCNK, v_BCNK = (
                old.at[jnp.arange(batch)[:, None], positions].set(new.astype(old.dtype))
                for old, new in zip(cached, (k_BLNK, v_BLNK), strict=True)
            )
        scores_BNLC = jnp.einsum('BLNK,BCNK->BNLC', q_BLNK * shape[-1] ** -0.5, k_BCNK)
        # In float32: half-precision weights would not sum to 1.
        scores_BNLC = jnp.where(mask, scores_BNLC.astype(jnp.float32), -1e30)
        weights_BNLC = jax.nn.softmax(scores_BNLC).astype(v_BLNK.dtype)
        y_BLNK = jnp.einsum('BNLC,BCNK->BLNK', weights_BNLC, v_BCNK)
        return self.out(y_BLNK.reshape(x_BLD.shape)), (k_BCNK, v_BCNK)


class Block(nnx.Module):
    """Attention and an MLP, each normalized first and added to its input."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        dropout_rate: float,
        *,
        rotary: bool,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Creates the parameters.

        Args:
            width: features of a token.
            heads: number of attention heads; must divide the width.
            mlp_width: hidden units of the MLP.
            dropout_rate: probability of dropping an element of each branch's output in training.
            rotary: see `Attention`.
            rngs: random keys of the initial parameters and of dropout.
            **dtypes: `dtype` and `param_dtype` of the layers.
        """
        options = dict(rngs=rngs, **dtypes)
        self.attention_norm = _layer_norm(width, **options)
        self.attention = Attention(width, heads, rotary=rotary, **options)
        self.mlp_norm = _layer_norm(width, **options)
        self.mlp_in = _linear((width, mlp_width), ('embed', 'mlp'), **options)
        self.mlp_out = _linear((mlp_width, width), ('mlp', 'embed'), **options)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(
        self,
        x_BLD: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        cached: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Returns an array of the shape of the input, and the keys and values that it attends to.

        Args:
            x_BLD: the input.
            mask: bool, broadcast to (batch, heads, length, keys); False where masked.
            positions: int (batch, length) or (1, length), the position of each token in its
                sequence, and so in the cache.
            cached: the keys and values of earlier calls, in which those of the input are written;
                None without a cache.
        """
        y_BLD, keys_values = self.attention(self.attention_norm(x_BLD), mask, positions, cached)
        x_BLD = x_BLD + self.dropout(y_BLD)
        y_BLM = nnx.gelu(self.mlp_in(self.mlp_norm(x_BLD)))
        return x_BLD + self.dropout(self.mlp_out(y_BLM)), keys_values


class Transformer(nnx.Module):
    """Predicts the next token at every position, as `trainer.models.transformer` does.

    Its parameters have the names that they have there, except that `block_0` is `blocks/0`. It has
    no scan over the layers. With `trainer.models.decoding.with_own_cache`, it generates text: no
    other form of the model is needed, because the cache is an argument and a result of `extend`.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        layers: int = 4,
        width: int = 256,
        heads: int = 4,
        mlp_width: int | None = None,
        max_length: int = 1024,
        positions: Literal['learned', 'rotary'] = 'learned',
        tied: bool = False,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Creates the parameters.

        Args:
            vocab_size: number of tokens in the vocabulary.
            layers: number of blocks.
            width: width of the residual stream.
            heads: number of attention heads; must divide the width.
            mlp_width: hidden units of each MLP; by default 4 x width.
            max_length: maximum length of a sequence.
            positions: 'learned' for a table of position embeddings, or 'rotary' for queries and
                keys that are rotated: see `rotate`.
            tied: whether the logits are products with the embeddings of the tokens, instead of a
                layer of their own.
            dropout_rate: dropout of the embeddings and of each branch in training.
            dtype: dtype of the computation, such as bfloat16; None follows the parameters.
            param_dtype: dtype of the parameters.
            rngs: random keys of the initial parameters and of dropout.

        Raises:
            ValueError: for invalid options.
        """
        _check_options(width, heads, positions)
        self.max_length = max_length
        self.head_shape = (heads, width // heads)
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        normal = nnx.initializers.normal(0.02)
        embedding = _with_axes(normal, 'vocab', 'embed')
        self.tokens = nnx.Embed(vocab_size, width, embedding_init=embedding, **options)
        # `nnx.Embed` turns None into the dtype of its parameters now, whatever they are cast to.
        self.tokens.dtype = dtype
        table = _with_axes(normal, 'length', 'embed')
        self.positions = (
            nnx.Param(table(rngs.params(), (max_length, width), param_dtype))
            if positions == 'learned'
            else None
        )
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        sizes = (width, heads, mlp_width or 4 * width, dropout_rate)
        rotary = positions == 'rotary'
        # `nnx.List`, because NNX does not look for modules in a Python list.
        self.blocks = nnx.List([Block(*sizes, rotary=rotary, **options) for _ in range(layers)])
        self.norm = _layer_norm(width, **options)
        self.logits = None if tied else _linear((width, vocab_size), ('embed', 'vocab'), **options)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits (batch, length, vocab_size) for integer tokens (batch, length).

        Args:
            tokens: one sequence per example, or several packed ones.
            segments: int (batch, length), the index of each token's sequence; attention is
                restricted to the same sequence.
            positions: int (batch, length), the position of each token in its sequence; by default
                its position in the example.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f'{length} tokens, but max_length is {self.max_length}')
        if positions is None:
            positions = jnp.arange(length)[None]
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if segments is not None:
            mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        logits, _ = self._predict(tokens, mask, positions, [None] * len(self.blocks))
        return logits

    def empty_cache(self, batch: int, length: int) -> dict[str, Any]:
        """Returns the first cache of `extend`.

        Args:
            batch: number of sequences.
            length: number of tokens that fit in, at most `max_length`.
        """
        if length > self.max_length:
            raise ValueError(f'{length} tokens, but max_length is {self.max_length}')
        dtype = self.tokens.dtype or self.tokens.embedding[...].dtype
        zeros = jnp.zeros((batch, length, *self.head_shape), dtype)
        layers = [(zeros, zeros) for _ in self.blocks]
        return {'index': jnp.zeros(batch, jnp.int32), 'layers': layers}

    def extend(self, tokens: jax.Array, cache: Any) -> tuple[jax.Array, dict[str, Any]]:
        """Returns logits (batch, length, vocab_size) of tokens that continue those of a cache.

        Args:
            tokens: int (batch, length).
            cache: the result of `empty_cache`, or of the call before. Tokens that do not fit in
                are lost.

        Returns:
            The logits, and the new cache. Its `index`, int (batch,), counts the tokens.
        """
        positions = cache['index'][:, None] + jnp.arange(tokens.shape[1])
        size = cache['layers'][0][0].shape[1]
        # The unused part of a cache is after all queries.
        mask = (jnp.arange(size) <= positions[..., None])[:, None]
        logits, layers = self._predict(tokens, mask, positions, cache['layers'])
        return logits, {'index': cache['index'] + tokens.shape[1], 'layers': layers}

    def _predict(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        cached: Sequence[KeysValues | None],
    ) -> tuple[jax.Array, list[KeysValues]]:
        """Returns logits, and the keys and values of each layer."""
        x_BLD = self.tokens(tokens)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions[...][positions].astype(x_BLD.dtype)
        x_BLD = self.dropout(x_BLD)
        layers = []
        for block, each in zip(self.blocks, cached, strict=True):
            x_BLD, keys_values = block(x_BLD, mask, positions, each)
            layers.append(keys_values)
        x_BLD = self.norm(x_BLD)
        logits = self.tokens.attend(x_BLD) if self.logits is None else self.logits(x_BLD)
        return logits, layers


def _check_options(width: int, heads: int, positions: str) -> None:
    """Raises ValueError for invalid options of `Transformer`."""
    if heads < 1 or width % heads:
        raise ValueError(f'heads={heads} does not divide width={width}')
    if positions not in ('learned', 'rotary'):
        raise ValueError(f'positions: {positions!r} is none of learned, rotary')
    if positions == 'rotary' and width // heads % 2:
        raise ValueError(
            f'width={width}, heads={heads}: rotary positions need an even number of features per '
            'head'
        )
