# SPDX-License-Identifier: Apache-2.0
"""A multilayer perceptron, written with NNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from flax import nnx


class MLP(nnx.Module):
    """Dense layers with an activation and optional batch normalization and dropout between them."""

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
        """Creates the parameters.

        Args:
            inputs: size of an example, flattened.
            features: widths of the layers; the last one is the output.
            activation: applied after every layer except the last.
            batch_norm: whether to normalize before each activation.
            dropout_rate: probability of dropping a hidden unit in training.
            rngs: random keys of the initial parameters and of dropout.
        """
        widths = (inputs, *features)
        hidden = features[:-1]
        # `nnx.List`, because NNX does not look for modules in a Python list.
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
            # NNX returns float32 if the statistics are float32, whatever the dtype of the inputs.
            x = self.norm[i](x).astype(x.dtype) if self.norm else x
            x = dropout(self.activation(x))
        return self.dense[-1](x)
