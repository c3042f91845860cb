# SPDX-License-Identifier: Apache-2.0
"""`optax:MultiSteps`: keys that work with it, and keys that require `accumulate` instead."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.step import tiny
from trainer.config.errors import UserError

ADAM = {'target': 'optax:adam', 'learning_rate': 0.01}
DECAY = {
    'target': 'optax:linear_schedule', 'init_value': 0.1, 'end_value': 0.0, 'transition_steps': 10,
}  # fmt: skip
SGD = {'target': 'optax:sgd', 'learning_rate': DECAY}


def multi(opt: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {'target': 'optax:MultiSteps', 'opt': opt, 'every_k_schedule': 2, **more}


RIGHT: dict[str, tuple[Any, Any]] = {
    # With MultiSteps, and with micro-batches of batches twice as large.
    'a schedule': (multi(SGD), SGD),
    'a chain that clips': (
        multi({'target': 'optax:chain', 'args': (
            {'target': 'optax:clip_by_global_norm', 'max_norm': 0.1}, ADAM,
        )}),
        {**ADAM, 'clip_norm': 0.1},
    ),
    'frozen and multiplied': (
        multi(ADAM, freeze='Dense_0/bias', lr_multipliers=(('.*', 0.5),)),
        {**ADAM, 'freeze': 'Dense_0/bias', 'lr_multipliers': (('.*', 0.5),)},
    ),
    'groups': (
        {'groups': {'a': multi(ADAM, params='.*/kernel'), 'b': multi(SGD, params='.*/bias')}},
        {'groups': {'a': {**ADAM, 'params': '.*/kernel'}, 'b': {**SGD, 'params': '.*/bias'}}},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', RIGHT)
def test_two_steps_equal_two_micro_batches(name: str) -> None:
    """The examples are in the same order, and all updates are equal; schedules count updates."""
    ours, theirs = RIGHT[name]
    options: dict[str, Any] = {'evals': {}, 'log': {'every': '2 steps'}}
    many = tiny.trainer(optimizer=ours, train_for='20 steps', **options).fit()
    data = {'source': tiny.SOURCE, 'batch_size': 64}
    few = tiny.trainer(
        optimizer=theirs, train_for='10 steps', data=data, accumulate=2,
        **{**options, 'log': {'every': '1 steps'}},
    ).fit()  # fmt: skip
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        many.state.params,
        few.state.params,
    )
    # The last step makes an update: its row has the rate and the norm of that update.
    for metric in many.metrics:
        if metric.startswith('train/learning_rate') or metric == 'train/update_norm':
            assert many.metrics[metric] == pytest.approx(few.metrics[metric], rel=1e-3), metric


def overflowing(model: Any, batch: Any) -> jax.Array:
    """A loss that overflows while the loss scale is large."""
    return (model(batch['x']) ** 2).mean(-1)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_overflowing_step_is_not_part_of_an_update() -> None:
    """With a loss scale: accumulated gradients and count are kept, and the rate is of the count."""
    schedule = {**DECAY, 'transition_steps': 100}
    made = tiny.trainer(
        optimizer=multi({**SGD, 'learning_rate': schedule}),
        task={'ref': f'{__name__}:overflowing'}, evals={},
        precision={'compute': 'float16', 'loss_scale': 2.0**30}, train_for='60 steps',
        log={'every': '1 steps', 'learning_rates': ('opt.learning_rate',)},
    )  # fmt: skip
    result = made.fit()
    inner = result.state.opt_state
    skipped = int(result.state.loss_scale.skipped)
    assert 5 < skipped < 30
    assert int(inner.gradient_step) == (60 - skipped) // 2
    assert int(inner.mini_step) == (60 - skipped) % 2
    updates = (59 - skipped) // 2
    rate = 0.1 * (1 - updates / 100)
    assert result.metrics['train/learning_rate'] == pytest.approx(rate)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(result.state.params))


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    'clip_norm': (multi(ADAM, clip_norm=1.0), {}, r'config\.optimizer\.clip_norm: it would clip'),
    'clip_norm of a group': (
        {'groups': {'all': multi(ADAM, params='.*', clip_norm=1.0)}},
        {},
        r'config\.optimizer\.groups\.all\.clip_norm: it would clip',
    ),
    'clip_norm over groups': (
        {'groups': {'all': multi(ADAM, params='.*')}, 'clip_norm': 1.0},
        {},
        r'config\.optimizer\.clip_norm: it would clip',
    ),
    'clip_norm beside frozen ones': (
        multi(ADAM, clip_norm=1.0, freeze='Dense_0/bias'),
        {},
        r'config\.optimizer\.clip_norm: it would clip',
    ),
    'ema': (multi(ADAM), {'ema': {'decay': 0.9}}, r'config\.ema: the average would be'),
    'durations': (
        multi({**SGD, 'learning_rate': {**DECAY, 'transition_steps': '100%'}}),
        {},
        r'config\.optimizer\.opt\.learning_rate\.transition_steps: durations are converted',
    ),
    'durations by position': (
        {'groups': {'all': {
            'target': 'optax:MultiSteps', 'every_k_schedule': 2, 'params': '.*',
            'args': ({**SGD, 'learning_rate': {**DECAY, 'transition_steps': '1 epoch'}},),
        }}},
        {},
        r'config\.optimizer\.groups\.all\.args\[0\]\.learning_rate\.transition_steps: durations',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', WRONG)
def test_incompatible_keys_are_rejected_before_compilation(name: str) -> None:
    optimizer, options, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        tiny.trainer(optimizer=optimizer, **options).compile()
    assert 'config.accumulate' in str(error.value)
