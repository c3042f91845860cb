# SPDX-License-Identifier: Apache-2.0
"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Dense layers with an activation and optional batch normalization and dropout between them.

    Attributes:
        features: widths of the layers; the last one is the output.
        activation: applied after every layer except the last.
        batch_norm: whether to normalize before each activation, with statistics in `batch_stats`.
        dropout_rate: probability of dropping a hidden unit in training.
    """

    features: Sequence[int] = (64, 10)
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    batch_norm: bool = False
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns (batch, features[-1]) for inputs (batch, ...)."""
        x = x.reshape((x.shape[0], -1))
        for features in self.features[:-1]:
            x = nn.Dense(features)(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(self.activation(x))
        return nn.Dense(self.features[-1])(x)
