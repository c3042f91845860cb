# SPDX-License-Identifier: Apache-2.0
"""A policy and its critic: two perceptrons on the same observations.

Legend: B examples, A actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class ActorCritic(nn.Module):
    """Logits of the actions, and the value of the state.

    Attributes:
        num_actions: A.
        features: widths of the hidden layers of both.
        activation: applied after every hidden layer.
    """

    num_actions: int = 2
    features: Sequence[int] = (64, 64)
    activation: Callable[[jax.Array], jax.Array] = nn.tanh

    @nn.compact
    def __call__(self, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns logits (B, A) and values (B,) for observations (B, ...)."""
        x = observation.reshape((len(observation), -1))
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.float32)
        # Small logits: at the beginning all actions are about equally likely.
        logits = self._apply(x, self.num_actions, 0.01, 'policy')
        return logits, self._apply(x, 1, 1.0, 'critic')[:, 0]

    def _apply(self, x: jax.Array, outputs: int, scale: float, name: str) -> jax.Array:
        hidden = nn.initializers.orthogonal(jnp.sqrt(2.0))
        for i, width in enumerate(self.features):
            x = self.activation(nn.Dense(width, kernel_init=hidden, name=f'{name}_{i}')(x))
        last = nn.initializers.orthogonal(scale)
        return nn.Dense(outputs, kernel_init=last, name=f'{name}_out')(x)
