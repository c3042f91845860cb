# SPDX-License-Identifier: Apache-2.0
"""MLP-Mixer (Tolstikhin et al., 2021): images without convolutions and without attention.

A suffix of a name says which dimensions an array has:

    B  images of a batch          R  rows of patches           L  patches, R x S
    H  height in pixels           S  columns of patches        D  width of the model
    W  width in pixels            C  channels                  M  hidden units of an MLP
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """Two dense layers over the last dimension, whose size stays the same.

    Attributes:
        hidden: units between them.
        dtype: dtype of the computation; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    hidden: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array of the shape of the input."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = nn.gelu(nn.Dense(self.hidden, name='dense1', **dtypes)(x))
        return nn.Dense(x.shape[-1], name='dense2', **dtypes)(hidden)


class Block(nn.Module):
    """Mixes tokens, then channels; each MLP is normalized first and added to its input.

    Attributes:
        tokens_width: hidden units of the MLP over tokens.
        channels_width: hidden units of the MLP over channels.
        dropout_rate: probability of dropping an element of each branch's output in training.
        dtype: dtype of the computation; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    tokens_width: int
    channels_width: int
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, train: bool = False) -> jax.Array:
        """Returns an array of the shape of the input."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)

        y_BDL = nn.LayerNorm(name='tokens_norm', **dtypes)(x_BLD).swapaxes(1, 2)
        y_BDL = MLP(self.tokens_width, name='tokens', **dtypes)(y_BDL)
        x_BLD = x_BLD + dropout(y_BDL.swapaxes(1, 2))

        y_BLD = nn.LayerNorm(name='channels_norm', **dtypes)(x_BLD)
        return x_BLD + dropout(MLP(self.channels_width, name='channels', **dtypes)(y_BLD))


class Mixer(nn.Module):
    """Dense layers on patches of an image; the defaults are those of Mixer-S/16.

    The first layer of each MLP over tokens has one row for each patch, so the model fits only
    images of the size that it was initialized with.

    Attributes:
        num_classes: number of logits.
        patch_size: height and width of a patch; must divide those of the images.
        layers: number of blocks.
        width: features of a token.
        tokens_width: hidden units of each MLP over tokens; by default half of the width.
        channels_width: hidden units of each MLP over channels; by default 4 x width.
        dropout_rate: dropout of each branch in training.
        dtype: dtype of the computation, such as bfloat16; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    num_classes: int = 1000
    patch_size: int = 16
    layers: int = 8
    width: int = 512
    tokens_width: int | None = None
    channels_width: int | None = None
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

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
        for layer in range(self.layers):
            block = Block(
                self.tokens_width or width // 2,
                self.channels_width or 4 * width,
                self.dropout_rate,
                name=f'blocks_{layer}',
                **dtypes,
            )
            x_BLD = block(x_BLD, train)
        return nn.LayerNorm(name='norm', **dtypes)(x_BLD).mean(axis=1)

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
