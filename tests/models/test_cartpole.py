# SPDX-License-Identifier: Apache-2.0
"""CartPole equals that of Gymnasium."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.models.cartpole import CartPole

STEP = jax.jit(CartPole().step)
KEY = jax.random.key(0)


def test_steps_are_those_recorded_from_gymnasium() -> None:
    state = jnp.array([0.01, -0.02, 0.03, 0.04])
    seen = []
    for action in (1, 1, 0, 1, 0, 0, 1, 1):
        state, observation, reward, failed = STEP(state, action, KEY)
        seen.append(observation)
        assert reward == 1 and not failed
    expected = [[0.023958, 0.368769, 0.0109183, -0.5129163]]
    expected += [[0.0378413, 0.3686908, -0.00651, -0.5111242]]
    np.testing.assert_allclose([seen[3], seen[7]], expected, atol=2e-6)


def test_steps_are_those_of_gymnasium() -> None:
    gymnasium = pytest.importorskip('gymnasium')
    theirs = gymnasium.make('CartPole-v1').unwrapped
    chance = np.random.default_rng(0)
    for episode in range(5):
        observation, _ = theirs.reset(seed=episode)
        ended = False
        while not ended:
            action = int(chance.integers(2))
            _, ours, reward, failed = STEP(jnp.asarray(observation), action, KEY)
            observation, their_reward, ended, *_ = theirs.step(action)
            np.testing.assert_allclose(ours, observation, atol=1e-6)
            assert (reward, failed) == (their_reward, ended)


@pytest.mark.parametrize(
    ('state', 'failed'),
    [
        ([2.399, 1.0, 0.0, 0.0], True),
        ([2.3, 1.0, 0.0, 0.0], False),
        ([0.0, 0.0, 0.2094, 1.0], True),
        ([0.0, 0.0, -0.2, 0.0], False),
    ],
)
def test_an_episode_ends_at_the_limits(state: list[float], failed: bool) -> None:
    assert STEP(jnp.array(state), 1, KEY)[3] == failed


def test_episodes_begin_near_the_middle() -> None:
    states, observations = jax.vmap(CartPole().reset)(jax.random.split(KEY, 100))
    np.testing.assert_array_equal(states, observations)
    assert 0.04 < jnp.abs(states).max() <= 0.05


def test_the_picture_shows_the_pole() -> None:
    upright = CartPole().render(jnp.zeros(4))
    leaning = CartPole().render(jnp.array([0.0, 0.0, 0.2, 0.0]))
    assert upright.shape == (40, 64, 1) and set(np.unique(upright)) == {0, 1}
    columns = np.nonzero(np.asarray(leaning[:15, :, 0]).any(0))[0]
    assert columns.min() > 32  # To the right, as its angle is positive.
    assert np.asarray(upright[:15, :, 0]).any(0).nonzero()[0].tolist() == [32]
