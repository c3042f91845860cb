# SPDX-License-Identifier: Apache-2.0
"""Advantages, and what a rollout consists of."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.models.rollouts import Rollouts, estimate_advantages


def test_advantages_are_those_of_a_plain_loop() -> None:
    chance = np.random.default_rng(0)
    steps, envs, discount, decay = 12, 3, 0.9, 0.8
    rewards, values, next_values = chance.normal(size=(3, steps, envs)).astype(np.float32)
    ends = chance.random((steps, envs)) < 0.3
    expected = np.zeros((steps, envs))
    for env in range(envs):
        for start in range(steps):
            factor = 1.0
            for t in range(start, steps):
                error = rewards[t, env] + discount * next_values[t, env] - values[t, env]
                expected[start, env] += factor * error
                factor *= discount * decay
                if ends[t, env]:
                    break
    ours = estimate_advantages(rewards, values, next_values, ends, discount=discount, decay=decay)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


class Counter:
    """An environment whose state and reward count its steps; action 1 ends the episode."""

    num_actions = 2
    most_steps = 5
    observation = jax.ShapeDtypeStruct((1,), jnp.float32)

    def reset(self, key: jax.Array) -> Any:
        return jnp.float32(0), jnp.zeros(1)

    def step(self, state: Any, action: Any, key: jax.Array) -> Any:
        return state + 1, (state + 1)[None], state + 1, action == 1


def play(action: int, **options: Any) -> tuple[dict[str, np.ndarray], Any, Rollouts]:
    source = Rollouts(env=Counter(), envs=2, steps=8, batch_size=4, epochs=1, **options)

    def model(observation: jax.Array) -> Any:
        logits = jnp.where(jnp.arange(2) == action, 0.0, -1e9)
        return jnp.broadcast_to(logits, (len(observation), 2)), observation[:, 0] * 10

    carry = source.initial_carry(jax.random.key(0))
    state = types.SimpleNamespace(model=model)
    batches, carry = jax.jit(lambda c: source.collect(state, c, jax.random.key(1)))(carry)
    return {name: np.asarray(x) for name, x in batches.items()}, carry, source


def test_rows_are_what_was_played() -> None:
    batches, carry, source = play(0, decay=0.0, discount=0.5)
    assert source.num_batches == 4
    assert {name: x.shape for name, x in batches.items()} == {
        name: (4, 4, *x.shape) for name, x in source.spec.items()
    }
    rows = {name: x.reshape(16, *x.shape[2:]) for name, x in batches.items()}
    # Two environments of 5 + 3 steps, in any order.
    seen = sorted(rows['observation'][:, 0].tolist())
    assert seen == sorted([0, 1, 2, 3, 4, 0, 1, 2] * 2)
    # Cut off after 5 steps, an episode still has the value 50 of what would have followed.
    np.testing.assert_allclose(
        rows['advantage'], (rows['observation'][:, 0] + 1) * (1 + 0.5 * 10) - rows['value']
    )
    np.testing.assert_allclose(rows['target'], rows['advantage'] + rows['value'])
    assert rows['ends'].sum() == 2
    assert set(rows['episode_return'][rows['ends'] > 0]) == {1 + 2 + 3 + 4 + 5}
    assert set(rows['episode_length'][rows['ends'] > 0]) == {5}
    # The next rollout continues these episodes.
    assert carry['observation'][:, 0].tolist() == [3, 3]
    assert carry['return'].tolist() == [6, 6]
    np.testing.assert_allclose(rows['log_prob'], 0)


def test_an_episode_that_fails_has_no_value_after_its_end() -> None:
    batches, *_ = play(1, decay=0.0, discount=0.5)
    assert (batches['ends'] == 1).all() and (batches['observation'] == 0).all()
    np.testing.assert_allclose(batches['advantage'], 1.0)


def test_each_epoch_has_each_step_once() -> None:
    source = Rollouts(env=Counter(), envs=2, steps=8, batch_size=8, epochs=3)
    model = lambda x: (jnp.zeros((len(x), 2)), x[:, 0])  # noqa: E731
    carry = source.initial_carry(jax.random.key(0))
    state = types.SimpleNamespace(model=model)
    batches, _ = source.collect(state, carry, jax.random.key(1))
    epochs = np.asarray(batches['advantage']).reshape(3, 16)
    assert (np.sort(epochs) == np.sort(epochs[0])).all()
    assert (epochs[0] != epochs[1]).any()


def test_a_batch_size_that_does_not_divide_the_steps() -> None:
    with pytest.raises(ValueError, match='10 does not divide the 16 steps'):
        Rollouts(env=Counter(), envs=2, steps=8, batch_size=10)
