# SPDX-License-Identifier: Apache-2.0
"""Vision transformers (ViT; Dosovitskiy et al., 2020), written with NNX.

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

import jax
import jax.numpy as jnp
from flax import nnx


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


def _check_options(width: int, heads: int, positions: str, pool: str) -> None:
    """Raises ValueError for invalid options of `ViT`."""
    if heads < 1 or width % heads:
        raise ValueError(f'heads={heads} does not divide width={width}')
    if positions not in ('learned', 'sincos'):
        raise ValueError(f'positions: {positions!r} is none of learned, sincos')
    if pool not in ('mean', 'token'):
        raise ValueError(f'pool: {pool!r} is none of mean, token')


class Attention(nnx.Module):
    """Multi-head self-attention of all tokens to all."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, **dtypes: Any):
        """Creates the parameters.

        Args:
            width: features of a token.
            heads: number of heads; must divide the width.
            rngs: random keys of the initial parameters.
            **dtypes: `dtype` and `param_dtype` of the layers.
        """
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs, **dtypes)
        self.out = nnx.Linear(width, width, rngs=rngs, **dtypes)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Returns an array of the shape of the input."""
        batch, length, width = x_BLD.shape
        qkv = self.qkv(x_BLD).reshape(batch, length, 3, self.heads, width // self.heads)
        q_BLNK, k_BLNK, v_BLNK = (qkv[:, :, i] for i in range(3))
        scores_BNLL = jnp.einsum('BLNK,BSNK->BNLS', q_BLNK * k_BLNK.shape[-1] ** -0.5, k_BLNK)
        # In float32: half-precision weights would not sum to 1.
        weights_BNLL = jax.nn.softmax(scores_BNLL.astype(jnp.float32)).astype(v_BLNK.dtype)
        y_BLNK = jnp.einsum('BNLS,BSNK->BLNK', weights_BNLL, v_BLNK)
        return self.out(y_BLNK.reshape(x_BLD.shape))


class Block(nnx.Module):
    """Attention and an MLP, each normalized first and added to its input."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        dropout_rate: float = 0.0,
        *,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Creates the parameters.

        Args:
            width: features of a token.
            heads: number of attention heads; must divide the width.
            mlp_width: hidden units of the MLP.
            dropout_rate: probability of dropping an element of each branch's output in training.
            rngs: random keys of the initial parameters and of dropout.
            **dtypes: `dtype` and `param_dtype` of the layers.
        """
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs, **dtypes)
        self.attention = Attention(width, heads, rngs=rngs, **dtypes)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs, **dtypes)
        self.mlp_in = nnx.Linear(width, mlp_width, rngs=rngs, **dtypes)
        self.mlp_out = nnx.Linear(mlp_width, width, rngs=rngs, **dtypes)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Returns an array of the shape of the input."""
        x_BLD = x_BLD + self.dropout(self.attention(self.attention_norm(x_BLD)))
        y_BLM = nnx.gelu(self.mlp_in(self.mlp_norm(x_BLD)))
        return x_BLD + self.dropout(self.mlp_out(y_BLM))


class ViT(nnx.Module):
    """A transformer encoder on patches of an image, as in `trainer.models.vit`.

    Its layers have the same names as there, except that `blocks_0` is `blocks/0`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        patch_size: int = 16,
        layers: int = 12,
        width: int = 384,
        heads: int = 6,
        mlp_width: int | None = None,
        positions: Literal['learned', 'sincos'] = 'learned',
        pool: Literal['mean', 'token'] = 'mean',
        dropout_rate: float = 0.0,
        size: int = 224,
        channels: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Creates the parameters.

        Args:
            num_classes: number of logits.
            patch_size: height and width of a patch; must divide the size.
            layers: number of blocks.
            width: features of a token.
            heads: number of attention heads; must divide the width.
            mlp_width: hidden units of each MLP; by default 4 x width.
            positions: 'learned', or 'sincos' for fixed ones, which fit images of any size.
            pool: how tokens become the features of an image: 'mean', or 'token' for an additional
                class token.
            dropout_rate: dropout of the embeddings and of each branch in training.
            size: height and width of the images; NNX does not infer it.
            channels: number of channels of the images.
            dtype: dtype of the computation, such as bfloat16; None follows inputs and parameters.
            param_dtype: dtype of the parameters.
            rngs: random keys of the initial parameters and of dropout.

        Raises:
            ValueError: for invalid options.
        """
        _check_options(width, heads, positions, pool)
        self.patch_size = patch_size
        dtypes = dict(dtype=dtype, param_dtype=param_dtype)
        patch = (patch_size, patch_size)
        self.patches = nnx.Conv(channels, width, patch, strides=patch, rngs=rngs, **dtypes)
        table = jax.random.normal(rngs.params(), ((size // patch_size) ** 2, width), param_dtype)
        self.positions = nnx.Param(table * width**-0.5) if positions == 'learned' else None
        self.token = nnx.Param(jnp.zeros((width,), param_dtype)) if pool == 'token' else None
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        sizes = (width, heads, mlp_width or 4 * width, dropout_rate)
        # `nnx.List`, because NNX does not look for modules in a Python list.
        self.blocks = nnx.List([Block(*sizes, rngs=rngs, **dtypes) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs, **dtypes)
        # All classes are equally probable at first, so that no gradient of the head is large.
        zeros = nnx.initializers.zeros
        self.head = nnx.Linear(width, num_classes, kernel_init=zeros, rngs=rngs, **dtypes)

    def features(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns the features of images, (batch, width)."""
        size = self.patch_size
        if x_BHWC.shape[1] % size or x_BHWC.shape[2] % size:
            raise ValueError(f'patch_size={size} does not divide images {x_BHWC.shape[1:3]}')
        x_BRSD = self.patches(x_BHWC)
        batch, rows, columns, width = x_BRSD.shape
        x_BLD = x_BRSD.reshape(batch, rows * columns, width)
        x_BLD = x_BLD + self._positions(rows, columns, width).astype(x_BLD.dtype)
        if self.token is not None:
            token_D = self.token[...].astype(x_BLD.dtype)
            token_B1D = jnp.broadcast_to(token_D, (batch, 1, width))
            x_BLD = jnp.concatenate([token_B1D, x_BLD], axis=1)
        x_BLD = self.dropout(x_BLD)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        x_BLD = self.norm(x_BLD)
        return x_BLD.mean(axis=1) if self.token is None else x_BLD[:, 0]

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns logits (batch, num_classes) for images (batch, height, width, channels)."""
        return self.head(self.features(x_BHWC))

    def _positions(self, rows: int, columns: int, width: int) -> jax.Array:
        if self.positions is None:
            return sincos_positions(rows, columns, width)
        table_LD = self.positions[...]
        if len(table_LD) != rows * columns:
            raise ValueError(
                f'the images have {rows} x {columns} patches, and the model has positions for '
                f'{len(table_LD)}: set `size` to the size of the images'
            )
        return table_LD
