# SPDX-License-Identifier: Apache-2.0
"""Vision transformers (ViT; Dosovitskiy et al., 2020) for images of any size.

A suffix of a name says which dimensions an array has:

    B  images of a batch          L  tokens: R x S patches, and the class token if there is one
    H  height in pixels           D  width of the model
    W  width in pixels            M  hidden units of the MLP
    C  channels                   N  attention heads
    R  rows of patches            K  units of a head, D / N
    S  columns of patches
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


def sincos_positions(rows: int, columns: int, width: int) -> jax.Array:
    """Returns fixed position embeddings of a grid, float32 (rows x columns, width).

    A quarter of the width each has the sine and the cosine of the column and of the row, at
    wavelengths from 2 pi to 20,000 pi patches.

    Raises:
        ValueError: if the width is not a multiple of 4, or is less than 8.
    """
    if width % 4 or width < 8:
        raise ValueError(f'width={width}: sincos positions need a multiple of 4, of at least 8')
    row_RS, column_RS = jnp.mgrid[:rows, :columns].astype(jnp.float32)
    frequency = 10_000.0 ** -(jnp.arange(width // 4) / (width // 4 - 1))
    angles = [x.reshape(-1, 1) * frequency for x in (column_RS, row_RS)]
    return jnp.concatenate([f(x) for x in angles for f in (jnp.sin, jnp.cos)], axis=1)


class Attention(nn.Module):
    """Multi-head self-attention of all tokens to all.

    Attributes:
        heads: number of heads; must divide the width.
        dtype: dtype of the computation; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    heads: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Returns an array of the shape of the input."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        batch, length, width = x_BLD.shape
        qkv = nn.Dense(3 * width, name='qkv', **dtypes)(x_BLD)
        qkv = qkv.reshape(batch, length, 3, self.heads, width // self.heads)
        q_BLNK, k_BLNK, v_BLNK = (qkv[:, :, i] for i in range(3))
        scores_BNLL = jnp.einsum('BLNK,BSNK->BNLS', q_BLNK * k_BLNK.shape[-1] ** -0.5, k_BLNK)
        # In float32: half-precision weights would not sum to 1.
        weights_BNLL = jax.nn.softmax(scores_BNLL.astype(jnp.float32)).astype(v_BLNK.dtype)
        y_BLNK = jnp.einsum('BNLS,BSNK->BLNK', weights_BNLL, v_BLNK)
        return nn.Dense(width, name='out', **dtypes)(y_BLNK.reshape(x_BLD.shape))


class Block(nn.Module):
    """Attention and an MLP, each normalized first and added to its input.

    Attributes:
        heads: number of attention heads; must divide the width.
        mlp_width: hidden units of the MLP.
        dropout_rate: probability of dropping an element of each branch's output in training.
        dtype: dtype of the computation; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    heads: int
    mlp_width: int
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, train: bool = False) -> jax.Array:
        """Returns an array of the shape of the input."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)

        y_BLD = nn.LayerNorm(name='attention_norm', **dtypes)(x_BLD)
        y_BLD = Attention(self.heads, name='attention', **dtypes)(y_BLD)
        x_BLD = x_BLD + dropout(y_BLD)

        y_BLD = nn.LayerNorm(name='mlp_norm', **dtypes)(x_BLD)
        y_BLM = nn.gelu(nn.Dense(self.mlp_width, name='mlp_in', **dtypes)(y_BLD))
        y_BLD = nn.Dense(x_BLD.shape[-1], name='mlp_out', **dtypes)(y_BLM)
        return x_BLD + dropout(y_BLD)


class ViT(nn.Module):
    """A transformer encoder on patches of an image; the defaults are those of ViT-S/16.

    With learned positions, the table has one row for each patch of the images that the model is
    initialized with. To load it into a model for images of another size, resample it:
    `trainer.weights:Interpolate`.

    Attributes:
        num_classes: number of logits.
        patch_size: height and width of a patch; must divide those of the images.
        layers: number of blocks.
        width: features of a token.
        heads: number of attention heads; must divide the width.
        mlp_width: hidden units of each MLP; by default 4 x width.
        positions: 'learned', or 'sincos' for fixed ones, which fit images of any size.
        pool: how tokens become the features of an image: 'mean', or 'token' for an additional
            class token.
        dropout_rate: dropout of the embeddings and of each branch in training.
        dtype: dtype of the computation, such as bfloat16; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    num_classes: int = 1000
    patch_size: int = 16
    layers: int = 12
    width: int = 384
    heads: int = 6
    mlp_width: int | None = None
    positions: Literal['learned', 'sincos'] = 'learned'
    pool: Literal['mean', 'token'] = 'mean'
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Raises ValueError for invalid options, before anything is traced."""
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f'heads={self.heads} does not divide width={self.width}')
        if self.positions not in ('learned', 'sincos'):
            raise ValueError(f'positions: {self.positions!r} is none of learned, sincos')
        if self.pool not in ('mean', 'token'):
            raise ValueError(f'pool: {self.pool!r} is none of mean, token')
        super().__post_init__()

    @nn.compact
    def features(self, x_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Returns the features of images, (batch, width)."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        size = self.patch_size
        if x_BHWC.shape[1] % size or x_BHWC.shape[2] % size:
            raise ValueError(f'patch_size={size} does not divide images {x_BHWC.shape[1:3]}')
        x_BRSD = nn.Conv(self.width, (size, size), (size, size), name='patches', **dtypes)(x_BHWC)
        batch, rows, columns, width = x_BRSD.shape
        x_BLD = x_BRSD.reshape(batch, rows * columns, width)
        x_BLD = x_BLD + self._positions(rows, columns).astype(x_BLD.dtype)
        if self.pool == 'token':
            token_D = self.param('token', nn.initializers.zeros, (width,), self.param_dtype)
            token_B1D = jnp.broadcast_to(token_D.astype(x_BLD.dtype), (batch, 1, width))
            x_BLD = jnp.concatenate([token_B1D, x_BLD], axis=1)
        x_BLD = nn.Dropout(self.dropout_rate, deterministic=not train)(x_BLD)

        for layer in range(self.layers):
            block = Block(
                self.heads,
                self.mlp_width or 4 * width,
                self.dropout_rate,
                name=f'blocks_{layer}',
                **dtypes,
            )
            x_BLD = block(x_BLD, train)
        x_BLD = nn.LayerNorm(name='norm', **dtypes)(x_BLD)
        return x_BLD[:, 0] if self.pool == 'token' else x_BLD.mean(axis=1)

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) for images (batch, height, width, channels)."""
        head = nn.Dense(
            self.num_classes,
            # All classes are equally probable at first, so that no gradient of the head is large.
            kernel_init=nn.initializers.zeros,
            name='head',
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        return head(self.features(x_BHWC, train))

    def _positions(self, rows: int, columns: int) -> jax.Array:
        if self.positions == 'sincos':
            return sincos_positions(rows, columns, self.width)
        init = nn.initializers.normal(self.width**-0.5)
        return self.param('positions', init, (rows * columns, self.width), self.param_dtype)
