# SPDX-License-Identifier: Apache-2.0
"""A decoder-only transformer language model whose arrays name their axes.

The names ('embed', 'heads', ...) say what a dimension is, not where it goes: `config.sharding` maps
them to the axes of the device mesh, and on one device they mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., Any]

_ACTIVATIONS = ('batch', 'length', 'embed')


def _named(init: Initializer, *axes: str) -> Initializer:
    return nn.with_logical_partitioning(init, axes)


def _layer_norm(name: str, **dtypes: Any) -> nn.LayerNorm:
    scale = _named(nn.initializers.ones, 'embed')
    bias = _named(nn.initializers.zeros, 'embed')
    return nn.LayerNorm(scale_init=scale, bias_init=bias, name=name, **dtypes)


class Attention(nn.Module):
    """Multi-head self-attention whose heads may be spread over devices.

    Flax's own (`nn.MultiHeadDotProductAttention`) has kernels of three dimensions that it makes
    from two; their names cannot be kept while a mesh is set.

    Attributes:
        heads: they divide the width.
        dtype: of the computation; None follows inputs and parameters.
        param_dtype: of the parameters.
    """

    heads: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns (batch, length, width) for inputs of the same shape; for `mask` see `Block`."""
        batch, length, width = x.shape
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = nn.initializers.lecun_normal()

        def project(name: str) -> jax.Array:
            y = nn.Dense(width, kernel_init=_named(init, 'embed', 'heads'), name=name, **dtypes)(x)
            y = y.reshape(batch, length, self.heads, width // self.heads)
            return nn.with_logical_constraint(y, ('batch', 'length', 'heads', 'head_dim'))

        query, key, value = (project(name) for name in ('query', 'key', 'value'))
        y = nn.dot_product_attention(query, key, value, mask=mask).reshape(x.shape)
        return nn.Dense(width, kernel_init=_named(init, 'heads', 'embed'), name='out', **dtypes)(y)


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection.

    Attributes:
        heads: attention heads; they divide the width.
        mlp_width: hidden units of the MLP.
        dropout_rate: probability of dropping an element of each branch's output in training.
        train: whether dropout is active.
        dtype: of the computation; None follows inputs and parameters.
        param_dtype: of the parameters.
    """

    heads: int
    mlp_width: int
    dropout_rate: float = 0.0
    train: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """Returns (batch, length, width) for inputs of the same shape, and None: scan's output.

        Args:
            x: (batch, length, width).
            mask: broadcast to (batch, heads, length, length); false where attention may not look.
        """
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = nn.initializers.lecun_normal()
        dropout = nn.Dropout(self.dropout_rate, deterministic=not self.train)

        y = _layer_norm('attention_norm', **dtypes)(x)
        y = Attention(heads=self.heads, name='attention', **dtypes)(y, mask)
        x = nn.with_logical_constraint(x + dropout(y), _ACTIVATIONS)

        y = _layer_norm('mlp_norm', **dtypes)(x)
        y = nn.Dense(
            self.mlp_width, kernel_init=_named(init, 'embed', 'mlp'), name='mlp_in', **dtypes
        )(y)
        y = nn.with_logical_constraint(nn.gelu(y), ('batch', 'length', 'mlp'))
        y = nn.Dense(
            x.shape[-1], kernel_init=_named(init, 'mlp', 'embed'), name='mlp_out', **dtypes
        )(y)
        return nn.with_logical_constraint(x + dropout(y), _ACTIVATIONS), None


class Transformer(nn.Module):
    """Predicts the next token at every position.

    Attributes:
        vocab_size: number of tokens.
        layers: number of blocks.
        width: of the residual stream.
        heads: attention heads; they divide the width.
        mlp_width: hidden units of each MLP; by default 4 x width.
        max_length: longest sequence that has position embeddings.
        dropout_rate: in training, of embeddings and of each branch.
        scan_layers: compile one block and loop over it: the layers' parameters are stacked in a
            first dimension 'layers'. Compiles faster; may run slower.
        remat: compute each block's activations again in the backward pass instead of keeping them.
        dtype: of the computation, such as bfloat16; None follows the parameters.
        param_dtype: of the parameters.
    """

    vocab_size: int = 256
    layers: int = 4
    width: int = 256
    heads: int = 4
    mlp_width: int | None = None
    max_length: int = 1024
    dropout_rate: float = 0.0
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

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
            tokens: of one sequence in each row, or of several packed ones.
            train: whether dropout is active.
            segments: int (batch, length), which sequence a token is of; none looks at another.
            positions: int (batch, length), the place of a token in its sequence; by default in its
                row.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f'{length} tokens, but max_length is {self.max_length}')
        embedding = _named(nn.initializers.normal(0.02), 'vocab', 'embed')
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = nn.Embed(
            self.vocab_size, self.width, embedding_init=embedding, name='tokens', **dtypes
        )(tokens)
        table = self.param(
            'positions',
            _named(nn.initializers.normal(0.02), 'length', 'embed'),
            (self.max_length, self.width),
            self.param_dtype,
        )
        table = table.astype(x.dtype)
        x = x + (table[:length] if positions is None else table[positions])
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.with_logical_constraint(x, _ACTIVATIONS)

        mask = nn.make_causal_mask(tokens, dtype=bool)
        if segments is not None:
            same = nn.make_attention_mask(segments, segments, jnp.equal, dtype=bool)
            mask = nn.combine_masks(mask, same, dtype=bool)
        x = self._blocks(x, mask, train)

        x = _layer_norm('norm', **dtypes)(x)
        init = _named(nn.initializers.lecun_normal(), 'embed', 'vocab')
        logits = nn.Dense(self.vocab_size, kernel_init=init, name='logits', **dtypes)(x)
        return nn.with_logical_constraint(logits, ('batch', 'length', 'vocab'))

    def _blocks(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        block: Any = nn.remat(Block, prevent_cse=not self.scan_layers) if self.remat else Block
        options = dict(
            heads=self.heads,
            mlp_width=self.mlp_width or 4 * self.width,
            dropout_rate=self.dropout_rate,
            train=train,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        if self.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={'params': 0, 'intermediates': 0, 'perturbations': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=nn.broadcast,
                length=self.layers,
                metadata_params={nn.PARTITION_NAME: 'layers'},
            )
            return stack(name='blocks', **options)(x, mask)[0]
        for layer in range(self.layers):
            x, _ = block(name=f'block_{layer}', **options)(x, mask)
        return x
