# SPDX-License-Identifier: Apache-2.0
"""The convolutional network of the Flax quickstart."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax


class CNN(nn.Module):
    """Two convolution blocks and two dense layers: 824,458 parameters on 28 x 28 x 1 images.

    Attributes:
        num_classes: number of logits.
        features: output channels of the convolution blocks, each halving height and width.
        hidden: width of the dense layer before the logits.
        dropout_rate: probability of dropping a hidden unit in training.
    """

    num_classes: int = 10
    features: Sequence[int] = (32, 64)
    hidden: int = 256
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) for images (batch, height, width, channels)."""
        for features in self.features:
            x = nn.relu(nn.Conv(features, kernel_size=(3, 3))(x))
            x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)
