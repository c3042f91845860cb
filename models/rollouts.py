# SPDX-License-Identifier: Apache-2.0
"""Rollouts for policy gradients: the policy plays many copies of an environment at once.

Legend: E environments, T steps of a rollout, B batch size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


def estimate_advantages(
    rewards: jax.Array,
    values: jax.Array,
    next_values: jax.Array,
    ends: jax.Array,
    *,
    discount: float,
    decay: float,
) -> jax.Array:
    """Returns how much better each action was than expected (T, E).

    Generalized advantage estimation (Schulman et al., 2015, "High-dimensional continuous control
    using generalized advantage estimation", equation 16).

    Args:
        rewards: float (T, E).
        values: float (T, E), what the critic expected before each step.
        next_values: float (T, E), what it expects after it; 0 where the episode has failed.
        ends: bool (T, E), whether the episode ends with this step.
        discount: of rewards, for each step.
        decay: of later errors of the critic; 0 trusts it, 1 trusts the rewards.
    """
    errors = rewards + discount * next_values - values

    def add(later: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        error, end = step
        advantage = error + discount * decay * jnp.where(end, 0.0, later)
        return advantage, advantage

    return jax.lax.scan(add, jnp.zeros_like(errors[0]), (errors, ends), reverse=True)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """A source that plays with the model, which returns logits (E, actions) and values (E,).

    Each call plays T steps in E environments, and returns them several times, each time in another
    order. An episode that ends begins again at once.

    Fields of a batch: `observation`; `action` int32; `log_prob`, `value`, of the policy that
    played; `advantage`; `target`, what the critic should have said; and of each step that ends an
    episode, `episode_return` and `episode_length`, with `ends` 1.0 (0.0 otherwise), all float32.

    Attributes:
        env: the environment: see `models/cartpole.py`.
        batch_size: B, as in `config.data.batch_size`; it divides E x T.
        envs: E.
        steps: T.
        epochs: how often each step is trained on.
        discount: see `estimate_advantages`.
        decay: see `estimate_advantages`.
        reward_scale: factor of the rewards that are trained on, so that values are near 1.
    """

    env: Any
    batch_size: int
    envs: int = 16
    steps: int = 128
    epochs: int = 4
    discount: float = 0.99
    decay: float = 0.95
    reward_scale: float = 1.0

    def __post_init__(self) -> None:
        if (self.envs * self.steps) % self.batch_size:
            raise ValueError(
                f'batch_size: {self.batch_size} does not divide the {self.envs * self.steps} steps '
                'of a rollout (envs x steps)'
            )

    @property
    def num_batches(self) -> int:
        """Batches of one rollout, all epochs."""
        return self.epochs * self.envs * self.steps // self.batch_size

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each field of one step."""
        number = jax.ShapeDtypeStruct((), jnp.float32)
        names = ('log_prob', 'value', 'advantage', 'target', 'ends')
        return {
            'observation': self.env.observation,
            'action': jax.ShapeDtypeStruct((), jnp.int32),
            **dict.fromkeys((*names, 'episode_return', 'episode_length'), number),
        }

    def initial_carry(self, key: jax.Array) -> dict[str, Any]:
        """Returns E environments at the beginning of an episode."""
        state, observation = jax.vmap(self.env.reset)(jax.random.split(key, self.envs))
        zeros = jnp.zeros(self.envs, jnp.float32)
        return {'state': state, 'observation': observation, 'return': zeros, 'length': zeros}

    def collect(
        self, state: Any, carry: dict[str, Any], key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Plays T steps; returns the batches and where the environments are then."""
        play_key, order_key = jax.random.split(key)
        keys = jax.random.split(play_key, self.steps)
        carry, played = jax.lax.scan(lambda c, k: self._play(state.model, c, k), carry, keys)
        rows = self._to_rows(played)
        count = self.envs * self.steps

        def shuffle(key: jax.Array) -> dict[str, jax.Array]:
            order = jax.random.permutation(key, count)
            return {
                name: x[order].reshape((-1, self.batch_size, *x.shape[1:]))
                for name, x in rows.items()
            }

        epochs = jax.lax.map(shuffle, jax.random.split(order_key, self.epochs))
        return {name: x.reshape((-1, *x.shape[2:])) for name, x in epochs.items()}, carry

    def _play(self, model: Any, carry: dict[str, Any], key: jax.Array) -> tuple[Any, Any]:
        """Makes one step in each environment."""
        act_key, step_key, reset_key = jax.random.split(key, 3)
        observation = carry['observation']
        logits, value = model(observation)
        action = jax.random.categorical(act_key, logits).astype(jnp.int32)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=1)[:, 0]
        step_keys = jax.random.split(step_key, self.envs)
        env_state, seen, reward, failed = jax.vmap(self.env.step)(carry['state'], action, step_keys)
        length, total = carry['length'] + 1, carry['return'] + reward
        ends = failed | (length >= self.env.most_steps)
        # An episode that is merely cut off would have gone on: its end has a value.
        next_value = jnp.where(failed, 0.0, model(seen)[1])
        fresh = jax.vmap(self.env.reset)(jax.random.split(reset_key, self.envs))
        new_state, new_observation = jax.tree.map(
            lambda new, old: jnp.where(ends.reshape((-1,) + (1,) * (old.ndim - 1)), new, old),
            fresh,
            (env_state, seen),
        )
        going = jnp.where(ends, 0.0, 1.0)
        new = {
            'state': new_state,
            'observation': new_observation,
            'return': total * going,
            'length': length * going,
        }
        step = {
            'observation': observation,
            'action': action,
            'log_prob': log_prob,
            'value': value,
            'next_value': next_value,
            'reward': reward,
            'ends': ends.astype(jnp.float32),
            'episode_return': total,
            'episode_length': length,
        }
        return new, step

    def _to_rows(self, played: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns what was played (T, E, ...), with advantages, as rows (T x E, ...)."""
        advantage = estimate_advantages(
            self.reward_scale * played.pop('reward'),
            played['value'],
            played.pop('next_value'),
            played['ends'] > 0,
            discount=self.discount,
            decay=self.decay,
        )
        fields = {**played, 'advantage': advantage, 'target': advantage + played['value']}
        return {
            name: x.reshape((-1, *x.shape[2:])).astype(self.spec[name].dtype)
            for name, x in fields.items()
        }
