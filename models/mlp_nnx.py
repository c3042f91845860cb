# SPDX-License-Identifier: Apache-2.0
"""A multilayer perceptron, written with NNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from flax import nnx


class MLP(nnx.Module):
    """Dense layers with an activation and optional batch normalisation and dropout between them."""

    def __init__(
        self,
        *,
        inputs: int = 784,
        features: Sequence[int] = (64, 10),
        activation: Callable[[jax.Array], jax.Array] = nnx.relu,
        batch_norm: bool = False,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters.

        Args:
            inputs: numbers in each example.
            features: widths of the layers; the last one is the output.
            activation: applied after every layer but the last.
            batch_norm: normalise before each activation.
            dropout_rate: probability of dropping a hidden unit in training.
            rngs: where the first values of the parameters come from.
        """
        widths = (inputs, *features)
        hidden = features[:-1]
        self.dense = nnx.List(
            [nnx.Linear(i, o, rngs=rngs) for i, o in zip(widths, features, strict=False)]
        )
        self.norm = nnx.List(
            [nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in hidden if batch_norm]
        )
        self.dropout = nnx.List([nnx.Dropout(dropout_rate, rngs=rngs) for _ in hidden])
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (batch, features[-1]) for inputs (batch, ...)."""
        x = x.reshape((x.shape[0], -1))
        for i, dropout in enumerate(self.dropout):
            x = self.dense[i](x)
            # If the statistics are float32 and the inputs are not, NNX returns float32.
            x = self.norm[i](x).astype(x.dtype) if self.norm else x
            x = dropout(self.activation(x))
        return self.dense[-1](x)
