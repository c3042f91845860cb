# SPDX-License-Identifier: Apache-2.0
"""CartPole on the devices: a pole on a cart, to be balanced by pushing the cart left or right.

The dynamics, the limits and the reward are those of Gymnasium's `CartPole-v1`, which follow Barto,
Sutton and Anderson, "Neuronlike adaptive elements that can solve difficult learning control
problems", 1983. tests/models/test_cartpole.py compares them step by step.

An environment is any object with these methods and attributes; `models/rollouts.py` plays it.

Legend: a state and an observation are the same here: float32 (4,): position, velocity, angle,
angular velocity.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

GRAVITY, CART, POLE, HALF_LENGTH = 9.8, 1.0, 0.1, 0.5
FORCE, SECS = 10.0, 0.02
MOST_ANGLE, MOST_POSITION = 12 * 2 * jnp.pi / 360, 2.4


@dataclasses.dataclass(frozen=True)
class CartPole:
    """The environment; each step has reward 1.

    Attributes:
        most_steps: steps after which an episode is cut off.
    """

    most_steps: int = 500

    num_actions = 2
    observation = jax.ShapeDtypeStruct((4,), jnp.float32)

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the state and the observation at the beginning of an episode."""
        state = jax.random.uniform(key, (4,), jnp.float32, -0.05, 0.05)
        return state, state

    def step(
        self, state: jax.Array, action: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Pushes the cart to the left (0) or right (1).

        Returns:
            The next state and observation, the reward, and whether the pole has fallen or the cart
            has left the track.
        """
        _, velocity, angle, spin = state
        force = jnp.where(action == 1, FORCE, -FORCE)
        total = CART + POLE
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        push = (force + POLE * HALF_LENGTH * jnp.square(spin) * sine) / total
        inertia = HALF_LENGTH * (4 / 3 - POLE * jnp.square(cosine) / total)
        turn = (GRAVITY * sine - cosine * push) / inertia
        pull = push - POLE * HALF_LENGTH * turn * cosine / total
        new = state + SECS * jnp.stack([velocity, pull, spin, turn])
        failed = (jnp.abs(new[0]) > MOST_POSITION) | (jnp.abs(new[2]) > MOST_ANGLE)
        return new, new, jnp.float32(1), failed

    def render(self, state: jax.Array) -> jax.Array:
        """Returns a picture, float32 (40, 64, 1) from 0 to 1."""
        y, x = jnp.mgrid[0:40, 0:64].astype(jnp.float32)
        center = 32 + state[0] * 32 / MOST_POSITION
        cart = (jnp.abs(x - center) < 5) & (jnp.abs(y - 32) < 2.5)
        # How far along the pole and beside it a pixel is.
        right, up = x - center, 30 - y
        along = right * jnp.sin(state[2]) + up * jnp.cos(state[2])
        beside = right * jnp.cos(state[2]) - up * jnp.sin(state[2])
        pole = (along > 0) & (along < 22) & (jnp.abs(beside) < 1)
        return (cart | pole)[..., None].astype(jnp.float32)
