# SPDX-License-Identifier: Apache-2.0
"""The convolutional network of the Flax quickstart, written with NNX."""

from __future__ import annotations

import jax
from flax import nnx


class CNN(nnx.Module):
    """Two convolutions with average pooling and two dense layers, as in `trainer.models.cnn`."""

    def __init__(
        self,
        *,
        num_classes: int = 10,
        features: tuple[int, int] = (32, 64),
        hidden: int = 256,
        dropout_rate: float = 0.0,
        channels: int = 1,
        size: int = 28,
        rngs: nnx.Rngs,
    ):
        """Creates the parameters.

        Args:
            num_classes: number of logits.
            features: output channels of each convolution.
            hidden: units of the first dense layer.
            dropout_rate: probability of dropping a hidden unit in training.
            channels: number of channels of the images.
            size: height and width of the images; NNX does not infer it.
            rngs: random keys of the initial parameters and of dropout.
        """
        # Each pooling halves height and width.
        flat = features[1] * (size // 4) ** 2
        self.conv1 = nnx.Conv(channels, features[0], (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(features[0], features[1], (3, 3), rngs=rngs)
        self.dense1 = nnx.Linear(flat, hidden, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.dense2 = nnx.Linear(hidden, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits (batch, num_classes) for images (batch, size, size, channels)."""
        for conv in (self.conv1, self.conv2):
            x = nnx.avg_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        return self.dense2(self.dropout(nnx.relu(self.dense1(x))))
