# SPDX-License-Identifier: Apache-2.0
"""The loss of PPO, and episodes as an evaluation."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_rollouts import Counter
from trainer.config.errors import UserError
from trainer.tasks import PPO, Episodes

# The policy that played gave action 0 the probability 0.5; the one that is trained 0.8.
LOGITS = jnp.log(jnp.array([[0.8, 0.2]] * 4))


def batch(**changes: Any) -> dict[str, jax.Array]:
    fields = {
        'observation': jnp.zeros((4, 1)),
        'action': jnp.array([0, 0, 1, 1]),
        'log_prob': jnp.full(4, math.log(0.5)),
        'value': jnp.zeros(4),
        'advantage': jnp.array([1.0, -1.0, 1.0, -1.0]),
        'target': jnp.full(4, 2.0),
        'episode_return': jnp.zeros(4),
        'episode_length': jnp.zeros(4),
        'ends': jnp.zeros(4),
    }
    return {**fields, **changes}


def model(observation: jax.Array) -> tuple[jax.Array, jax.Array]:
    return LOGITS, jnp.full(4, 1.5)


def test_loss_is_computed_by_hand() -> None:
    task = PPO(clip=0.2, value_weight=0.5, entropy_weight=0.1, normalize=False)
    output = task(model, batch())
    # The ratios are 1.6, 1.6, 0.4 and 0.4, limited to 1.2, 1.2, 0.8 and 0.8. The smaller gain
    # counts: a gain is limited where the policy has moved far to the better already.
    np.testing.assert_allclose(output.metrics['policy_loss'], [-1.2, 1.6, -0.4, 0.8], rtol=1e-5)
    np.testing.assert_allclose(output.metrics['value_loss'], 0.125)
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    np.testing.assert_allclose(output.metrics['entropy'], entropy, rtol=1e-5)
    expected = np.array([-1.2, 1.6, -0.4, 0.8]) + 0.5 * 0.125 - 0.1 * entropy
    np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
    assert output.metrics['clipped'].tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(output.metrics['divergence'][0], 1.6 - 1 - math.log(1.6), rtol=1e-5)


def test_gradient_is_zero_where_the_policy_has_moved_far_enough() -> None:
    task = PPO(normalize=False, entropy_weight=0.0, value_weight=0.0)

    def loss(logits: jax.Array) -> jax.Array:
        return task(lambda _: (logits, jnp.zeros(4)), batch()).loss.sum()

    moved = np.abs(jax.grad(loss)(LOGITS)).sum(1) > 0
    assert moved.tolist() == [False, True, True, False]


def test_values_are_clipped_around_those_of_the_rollout() -> None:
    task = PPO(clip_value=0.5, normalize=False)
    # 1.5 is nearer to the target 2 than 0.5, which is as far as the critic may go: that one counts.
    np.testing.assert_allclose(task(model, batch()).metrics['value_loss'], (2 - 0.5) ** 2 / 2)


def test_advantages_are_normalized() -> None:
    plain, shifted = batch(), batch(advantage=batch()['advantage'] * 7 + 3)
    losses = [PPO()(model, each).loss for each in (plain, shifted)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize('output', [LOGITS, (LOGITS, jnp.zeros((4, 1))), (jnp.zeros(4), LOGITS)])
def test_another_output_is_named(output: Any) -> None:
    with pytest.raises(UserError, match=r'expected logits \(batch, actions\) and values'):
        PPO()(lambda _: output, batch())


def test_each_example_is_an_episode() -> None:
    def stop_at_three(observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = observation[:, 0]
        return jnp.stack([jnp.full_like(count, 0.5), (count == 3) * 1.0], 1), count

    task = Episodes(env=Counter())
    output = jax.jit(lambda b: task(stop_at_three, b))({'index': jnp.arange(3)})
    assert output.metrics['episode_length'].tolist() == [4, 4, 4]
    assert output.metrics['episode_return'].tolist() == [1 + 2 + 3 + 4] * 3
    assert output.loss.tolist() == [-10] * 3
    assert not output.summaries  # This environment has no pictures.

    never = jax.jit(lambda b: task(lambda x: (jnp.eye(2)[jnp.zeros(len(x), int)], x[:, 0]), b))
    assert never({'index': jnp.arange(2)}).metrics['episode_length'].tolist() == [5, 5]
