# SPDX-License-Identifier: Apache-2.0
"""MLP-Mixer (Tolstikhin et al., 2021), written with NNX.

A suffix of a name says which dimensions an array has:

    B  images of a batch          R  rows of patches           L  patches, R x S
    H  height in pixels           S  columns of patches        D  width of the model
    W  width in pixels            C  channels                  M  hidden units of an MLP
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    """Two dense layers over the last dimension, whose size stays the same."""

    def __init__(self, size: int, hidden: int, *, rngs: nnx.Rngs, **dtypes: Any):
        """Creates the parameters.

        Args:
            size: size of the last dimension.
            hidden: units between the layers.
            rngs: random keys of the initial parameters.
            **dtypes: `dtype` and `param_dtype` of the layers.
        """
        self.dense1 = nnx.Linear(size, hidden, rngs=rngs, **dtypes)
        self.dense2 = nnx.Linear(hidden, size, rngs=rngs, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array of the shape of the input."""
        return self.dense2(nnx.gelu(self.dense1(x)))


class Block(nnx.Module):
    """Mixes tokens, then channels; each MLP is normalized first and added to its input."""

    def __init__(
        self,
        tokens: int,
        width: int,
        tokens_width: int,
        channels_width: int,
        dropout_rate: float = 0.0,
        *,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Creates the parameters.

        Args:
            tokens: number of tokens.
            width: features of a token.
            tokens_width: hidden units of the MLP over tokens.
            channels_width: hidden units of the MLP over channels.
            dropout_rate: probability of dropping an element of each branch's output in training.
            rngs: random keys of the initial parameters and of dropout.
            **dtypes: `dtype` and `param_dtype` of the layers.
        """
        self.tokens_norm = nnx.LayerNorm(width, rngs=rngs, **dtypes)
        self.tokens = MLP(tokens, tokens_width, rngs=rngs, **dtypes)
        self.channels_norm = nnx.LayerNorm(width, rngs=rngs, **dtypes)
        self.channels = MLP(width, channels_width, rngs=rngs, **dtypes)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Returns an array of the shape of the input."""
        y_BDL = self.tokens(self.tokens_norm(x_BLD).swapaxes(1, 2))
        x_BLD = x_BLD + self.dropout(y_BDL.swapaxes(1, 2))
        return x_BLD + self.dropout(self.channels(self.channels_norm(x_BLD)))


class Mixer(nnx.Module):
    """Dense layers on patches of an image, as in `trainer.models.mixer`.

    Its layers have the same names as there, except that `blocks_0` is `blocks/0`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        patch_size: int = 16,
        layers: int = 8,
        width: int = 512,
        tokens_width: int | None = None,
        channels_width: int | None = None,
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
            tokens_width: hidden units of each MLP over tokens; by default half of the width.
            channels_width: hidden units of each MLP over channels; by default 4 x width.
            dropout_rate: dropout of each branch in training.
            size: height and width of the images; NNX does not infer it.
            channels: number of channels of the images.
            dtype: dtype of the computation, such as bfloat16; None follows inputs and parameters.
            param_dtype: dtype of the parameters.
            rngs: random keys of the initial parameters and of dropout.

        Raises:
            ValueError: if the patches do not divide the images.
        """
        if size % patch_size:
            raise ValueError(f'patch_size={patch_size} does not divide size={size}')
        self.size = size
        dtypes = dict(dtype=dtype, param_dtype=param_dtype)
        patch, tokens = (patch_size, patch_size), (size // patch_size) ** 2
        hidden = (tokens_width or width // 2, channels_width or 4 * width)
        self.patches = nnx.Conv(channels, width, patch, strides=patch, rngs=rngs, **dtypes)
        # `nnx.List`, because NNX does not look for modules in a Python list.
        self.blocks = nnx.List(
            [
                Block(tokens, width, *hidden, dropout_rate, rngs=rngs, **dtypes)
                for _ in range(layers)
            ]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs, **dtypes)
        # All classes are equally probable at first, so that no gradient of the head is large.
        zeros = nnx.initializers.zeros
        self.head = nnx.Linear(width, num_classes, kernel_init=zeros, rngs=rngs, **dtypes)

    def features(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns the features of images, (batch, width)."""
        if x_BHWC.shape[1:3] != (self.size, self.size):
            raise ValueError(f'images {x_BHWC.shape[1:3]}; the model is for size={self.size}')
        x_BRSD = self.patches(x_BHWC)
        batch, rows, columns, width = x_BRSD.shape
        x_BLD = x_BRSD.reshape(batch, rows * columns, width)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.norm(x_BLD).mean(axis=1)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns logits (batch, num_classes) for images (batch, height, width, channels)."""
        return self.head(self.features(x_BHWC))
