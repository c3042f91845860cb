# SPDX-License-Identifier: Apache-2.0
"""A decoder-only transformer language model with named dimensions.

The names ('embed', 'heads', ...) say what a dimension is, not where it is placed: `config.sharding`
maps them to mesh axes. On one device they have no effect.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., Any]

_ACTIVATIONS = ('batch', 'length', 'embed')


def _with_axes(init: Initializer, *axes: str) -> Initializer:
    return nn.with_logical_partitioning(init, axes)


def _layer_norm(name: str, **dtypes: Any) -> nn.LayerNorm:
    scale = _with_axes(nn.initializers.ones, 'embed')
    bias = _with_axes(nn.initializers.zeros, 'embed')
    return nn.LayerNorm(scale_init=scale, bias_init=bias, name=name, **dtypes)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates queries or keys by angles proportional to their positions (Su et al., 2021).

    The product of a query and a key then depends on the distance between their positions only.

    Args:
        x: (batch, length, heads, head_dim) with an even head_dim.
        positions: int (batch, length) or (1, length).

    Returns:
        An array of the shape and dtype of x.
    """
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** -(jnp.arange(half) / half)
    angles = (positions[..., None] * frequencies)[:, :, None]
    # In float32: half precision cannot tell large positions apart.
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention whose heads can be sharded over devices.

    Flax's `nn.MultiHeadDotProductAttention` initializes its three-dimensional kernels as matrices,
    which makes naming their dimensions fail while a mesh is set.

    Attributes:
        heads: number of attention heads; must divide the width.
        rotary: whether queries and keys are rotated by their positions: see `rotate`.
        cache_length: length of the cache of keys and values for decoding; 0 for no cache.
        dtype: dtype of the computation; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    heads: int
    rotary: bool = False
    cache_length: int = 0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, positions: jax.Array | None = None
    ) -> jax.Array:
        """Returns (batch, length, width) for inputs of the same shape; for the rest see `Block`."""
        batch, length, width = x.shape
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = nn.initializers.lecun_normal()

        def project(name: str) -> jax.Array:
            y = nn.Dense(
                width, kernel_init=_with_axes(init, 'embed', 'heads'), name=name, **dtypes
            )(x)
            y = y.reshape(batch, length, self.heads, width // self.heads)
            return nn.with_logical_constraint(y, ('batch', 'length', 'heads', 'head_dim'))

        query, key, value = (project(name) for name in ('query', 'key', 'value'))
        if self.rotary:
            assert positions is not None
            query, key = rotate(query, positions), rotate(key, positions)
        if self.cache_length:
            assert positions is not None
            key = self._update_cache('keys', key, positions)
            value = self._update_cache('values', value, positions)
        # bfloat16 probabilities would not sum to 1, so the softmax is in float32. Its result is
        # cast back: otherwise it would promote the next product and everything after it.
        weights = nn.dot_product_attention_weights(
            query, key, mask=mask, force_fp32_for_softmax=True
        ).astype(value.dtype)
        y = jnp.einsum('...hqk,...khd->...qhd', weights, value).reshape(x.shape)
        return nn.Dense(
            width, kernel_init=_with_axes(init, 'heads', 'embed'), name='out', **dtypes
        )(y)

    def _update_cache(self, name: str, new: jax.Array, positions: jax.Array) -> jax.Array:
        """Writes `new` into the cache at `positions`; returns all of it (batch, cache_length, ...).

        Args:
            name: name of the cache.
            new: (batch, length, heads, head_dim).
            positions: int (batch, length); those outside of the cache are not written.
        """
        shape = (new.shape[0], self.cache_length, *new.shape[2:])
        cache = self.variable('cache', name, jnp.zeros, shape, new.dtype)
        # The call that creates the cache must leave it empty.
        if not self.is_initializing():
            rows = jnp.arange(new.shape[0])[:, None]
            # A cache that was created before the parameters were cast has another dtype.
            update = new.astype(cache.value.dtype)
            cache.value = cache.value.at[rows, positions].set(update, mode='drop')
        return cache.value.astype(new.dtype)


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection.

    Attributes:
        heads: number of attention heads; must divide the width.
        mlp_width: hidden units of the MLP.
        dropout_rate: probability of dropping an element of each branch's output in training.
        train: whether dropout is active.
        rotary: see `Attention`.
        cache_length: see `Attention`.
        dtype: dtype of the computation; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    heads: int
    mlp_width: int
    dropout_rate: float = 0.0
    train: bool = False
    rotary: bool = False
    cache_length: int = 0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, positions: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """Returns (batch, length, width) for inputs of the same shape, and None for `nn.scan`.

        Args:
            x: (batch, length, width).
            mask: bool, broadcast to (batch, heads, length, keys); False where masked.
            positions: int (batch, length), the position of each input in its sequence, and so in
                the cache; only needed for a cache and for rotary positions.
        """
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = nn.initializers.lecun_normal()
        dropout = nn.Dropout(self.dropout_rate, deterministic=not self.train)

        y = _layer_norm('attention_norm', **dtypes)(x)
        attention = Attention(
            heads=self.heads,
            rotary=self.rotary,
            cache_length=self.cache_length,
            name='attention',
            **dtypes,
        )
        y = attention(y, mask, positions)
        x = nn.with_logical_constraint(x + dropout(y), _ACTIVATIONS)

        y = _layer_norm('mlp_norm', **dtypes)(x)
        y = nn.Dense(
            self.mlp_width, kernel_init=_with_axes(init, 'embed', 'mlp'), name='mlp_in', **dtypes
        )(y)
        y = nn.with_logical_constraint(nn.gelu(y), ('batch', 'length', 'mlp'))
        y = nn.Dense(
            x.shape[-1], kernel_init=_with_axes(init, 'mlp', 'embed'), name='mlp_out', **dtypes
        )(y)
        return nn.with_logical_constraint(x + dropout(y), _ACTIVATIONS), None


class Transformer(nn.Module):
    """Predicts the next token at every position.

    Attributes:
        vocab_size: number of tokens in the vocabulary.
        layers: number of blocks.
        width: width of the residual stream.
        heads: number of attention heads; must divide the width.
        mlp_width: hidden units of each MLP; by default 4 x width.
        max_length: maximum length of a sequence.
        positions: 'learned' for a table of position embeddings, or 'rotary' for queries and keys
            that are rotated: see `rotate`.
        tied: whether the logits are products with the embeddings of the tokens, instead of a layer
            of their own.
        dropout_rate: dropout of the embeddings and of each branch in training.
        scan_layers: whether to compile one block and scan over the layers, whose parameters are
            stacked in a leading dimension 'layers'. Compiles faster; may run slower.
        unroll: number of blocks per iteration of the scan.
        remat: 'none'; 'full' to recompute each block's activations in the backward pass instead of
            saving them; or the name of a policy in `jax.checkpoint_policies`, such as
            'dots_saveable', for what to save.
        decode: whether to cache keys and values in the collection 'cache', so that each call
            continues the tokens of the previous one. Its `index`, int (batch,), counts the tokens
            of each example so far. For `trainer.models.decoding`.
        dtype: dtype of the computation, such as bfloat16; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    vocab_size: int = 256
    layers: int = 4
    width: int = 256
    heads: int = 4
    mlp_width: int | None = None
    max_length: int = 1024
    positions: Literal['learned', 'rotary'] = 'learned'
    tied: bool = False
    dropout_rate: float = 0.0
    scan_layers: bool = False
    unroll: int = 1
    remat: str = 'none'
    decode: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Raises ValueError for invalid options, before anything is traced."""
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f'heads={self.heads} does not divide width={self.width}')
        if self.positions not in ('learned', 'rotary'):
            raise ValueError(f'positions: {self.positions!r} is none of learned, rotary')
        if self.positions == 'rotary' and self.width // self.heads % 2:
            raise ValueError(
                f'width={self.width}, heads={self.heads}: rotary positions need an even number of '
                'features per head'
            )
        _policy(self.remat)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        train: bool = False,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits (batch, length, vocab_size) for integer tokens (batch, length).

        Args:
            tokens: one sequence per example, or several packed ones.
            train: whether dropout is active.
            segments: int (batch, length), the index of each token's sequence; attention is
                restricted to the same sequence.
            positions: int (batch, length), the position of each token in its sequence; by default
                its position in the example.

        Raises:
            ValueError: for more tokens than `max_length`, and for segments or positions in the form
                that decodes.
        """
        self._check_inputs(tokens, segments, positions)
        length = tokens.shape[1]
        embedding = _with_axes(nn.initializers.normal(0.02), 'vocab', 'embed')
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        embed = nn.Embed(
            self.vocab_size, self.width, embedding_init=embedding, name='tokens', **dtypes
        )
        x = embed(tokens)
        if self.decode:
            positions = self._advance(tokens)
        if self.positions == 'learned':
            x = x + self._position_embeddings(length, positions).astype(x.dtype)
        if positions is None:
            positions = jnp.arange(length)[None]
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.with_logical_constraint(x, _ACTIVATIONS)

        mask = nn.make_causal_mask(tokens, dtype=bool)
        if self.decode:
            # Keys are those of the whole cache. Its unused part is after all queries.
            mask = (jnp.arange(self.max_length) <= positions[..., None])[:, None]
        elif segments is not None:
            same = nn.make_attention_mask(segments, segments, jnp.equal, dtype=bool)
            mask = nn.combine_masks(mask, same, dtype=bool)
        x = self._blocks(x, mask, positions, train)

        x = _layer_norm('norm', **dtypes)(x)
        if self.tied:
            logits = embed.attend(x)
        else:
            init = _with_axes(nn.initializers.lecun_normal(), 'embed', 'vocab')
            logits = nn.Dense(self.vocab_size, kernel_init=init, name='logits', **dtypes)(x)
        return nn.with_logical_constraint(logits, ('batch', 'length', 'vocab'))

    def _check_inputs(
        self, tokens: jax.Array, segments: jax.Array | None, positions: jax.Array | None
    ) -> None:
        if tokens.shape[1] > self.max_length:
            raise ValueError(f'{tokens.shape[1]} tokens, but max_length is {self.max_length}')
        if self.decode and not (segments is None and positions is None):
            raise ValueError(
                'segments, positions: not supported with decode=True: each example of a cache is '
                'one sequence, whose positions the cache counts'
            )

    def _position_embeddings(self, length: int, positions: jax.Array | None) -> jax.Array:
        """Returns those of the positions, by default of the first `length`."""
        table = self.param(
            'positions',
            _with_axes(nn.initializers.normal(0.02), 'length', 'embed'),
            (self.max_length, self.width),
            self.param_dtype,
        )
        return table[:length] if positions is None else table[positions]

    def _advance(self, tokens: jax.Array) -> jax.Array:
        """Returns the positions of tokens after those of the cache, int (batch, length)."""
        batch, length = tokens.shape
        index = self.variable('cache', 'index', jnp.zeros, (batch,), jnp.int32)
        positions = index.value[:, None] + jnp.arange(length)
        # The call that creates the cache must not advance it.
        if not self.is_initializing():
            index.value = index.value + length
        return positions

    def _blocks(
        self, x: jax.Array, mask: jax.Array, positions: jax.Array, train: bool
    ) -> jax.Array:
        block: Any = Block
        if self.remat != 'none':
            policy = _policy(self.remat)
            # Within a scan, XLA does not merge the recomputation with the original (CSE).
            block = nn.remat(Block, policy=policy, prevent_cse=not self.scan_layers)
        options = dict(
            heads=self.heads,
            mlp_width=self.mlp_width or 4 * self.width,
            dropout_rate=self.dropout_rate,
            train=train,
            rotary=self.positions == 'rotary',
            cache_length=self.max_length if self.decode else 0,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        if self.scan_layers:
            stack = nn.scan(
                block,
                # With the collections of recorders and decoding: a scan drops those not listed.
                variable_axes={'params': 0, 'cache': 0, 'intermediates': 0, 'perturbations': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=nn.broadcast,
                length=self.layers,
                unroll=self.unroll,
                metadata_params={nn.PARTITION_NAME: 'layers'},
            )
            return stack(name='blocks', **options)(x, mask, positions)[0]
        for layer in range(self.layers):
            x, _ = block(name=f'block_{layer}', **options)(x, mask, positions)
        return x


def _policy(name: str) -> Any:
    """Returns the policy of `jax.checkpoint` for the option `remat`, or None."""
    policies = {
        key: value for key, value in vars(jax.checkpoint_policies).items() if _is_policy(value)
    }
    if name in ('none', 'full'):
        return None
    if name not in policies:
        raise ValueError(f"remat={name!r} is none of 'none', 'full' and {', '.join(policies)}")
    return policies[name]


def _is_policy(value: Any) -> bool:
    """Whether this is a policy: other members of `jax.checkpoint_policies` create policies."""
    # A policy is called with a primitive and the primitive's parameters by name.
    kinds = [p.kind for p in inspect.signature(value).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds
