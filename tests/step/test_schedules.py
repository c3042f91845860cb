# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules from a config: optax's, the legacy ones of Flax, and ours."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import lr_schedule

from tests import command
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.step import schedules
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'configs' / 'mnist_mlp.py')
# Ten epochs of five steps.
SMALL = {'data__source__limit': 160, 'evals': {}, 'checkpoint__every': 'never'}
STEPS = (0, 1, 4, 5, 9, 10, 24, 25, 30, 49)

Schedule = Callable[[Any], Any]


def from_config(node: Mapping[str, Any]) -> Schedule:
    made = load_and_build(CONFIG, optimizer__learning_rate=dict(node), **SMALL)
    assert callable(made.optimizer.learning_rate)
    return made.optimizer.learning_rate


def assert_same(found: Schedule, expected: Schedule) -> None:
    for step in STEPS:
        assert float(found(step)) == pytest.approx(float(expected(step)), rel=1e-6, abs=1e-9)
        # As the compiled step calls it.
        assert float(found(jnp.int32(step))) == pytest.approx(float(expected(step)), rel=1e-5)


# The config's arguments, durations among them, and those that they stand for.
OPTAX: dict[str, tuple[dict[str, Any], Schedule]] = {
    'constant_schedule': ({'value': 0.1}, optax.constant_schedule(0.1)),
    'cosine_decay_schedule': (
        {'init_value': 0.1, 'decay_steps': '100%', 'alpha': 0.1},
        optax.cosine_decay_schedule(0.1, 50, 0.1),
    ),
    'cosine_onecycle_schedule': (
        {'transition_steps': '10 epochs', 'peak_value': 0.1},
        optax.cosine_onecycle_schedule(50, 0.1),
    ),
    'exponential_decay': (
        {'init_value': 0.1, 'transition_steps': '1 epoch', 'decay_rate': 0.5, 'staircase': True},
        optax.exponential_decay(0.1, 5, 0.5, staircase=True),
    ),
    'linear_onecycle_schedule': (
        {'transition_steps': '100%', 'peak_value': 0.1},
        optax.linear_onecycle_schedule(50, 0.1),
    ),
    'linear_schedule': (
        {'init_value': 0.1, 'end_value': 0.0, 'transition_steps': '50%'},
        optax.linear_schedule(0.1, 0.0, 25),
    ),
    'piecewise_constant_schedule': (
        {'init_value': 0.1, 'boundaries_and_scales': {'2 epochs': 0.1, '5 epochs': 0.5}},
        optax.piecewise_constant_schedule(0.1, {10: 0.1, 25: 0.5}),
    ),
    'piecewise_interpolate_schedule': (
        {'interpolate_type': 'cosine', 'init_value': 0.1,
         'boundaries_and_scales': {'5 epochs': 0.1}},
        optax.piecewise_interpolate_schedule('cosine', 0.1, {25: 0.1}),
    ),
    'polynomial_schedule': (
        {'init_value': 0.1, 'end_value': 0.01, 'power': 2, 'transition_steps': '100%'},
        optax.polynomial_schedule(0.1, 0.01, 2, 50),
    ),
    'sgdr_schedule': (
        {'args': (({'init_value': 0.0, 'peak_value': 0.1, 'decay_steps': '2 epochs',
                    'warmup_steps': '1 epoch', 'end_value': 0.0},) * 5,)},
        optax.sgdr_schedule([dict(init_value=0.0, peak_value=0.1, decay_steps=10, warmup_steps=5,
                                  end_value=0.0)] * 5),
    ),
    'warmup_constant_schedule': (
        {'init_value': 0.0, 'peak_value': 0.1, 'warmup_steps': '10%'},
        optax.warmup_constant_schedule(0.0, 0.1, 5),
    ),
    'warmup_cosine_decay_schedule': (
        {'init_value': 0.0, 'peak_value': 0.1, 'warmup_steps': '2 epochs', 'decay_steps': '100%'},
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 50),
    ),
    'warmup_exponential_decay_schedule': (
        {'init_value': 0.0, 'peak_value': 0.1, 'warmup_steps': '1 epoch', 'transition_steps': 10,
         'decay_rate': 0.5},
        optax.warmup_exponential_decay_schedule(0.0, 0.1, 5, 10, 0.5),
    ),
    'join_schedules': (
        {'schedules': ({'target': 'optax:linear_schedule', 'init_value': 0.0, 'end_value': 0.1,
                        'transition_steps': '1 epoch'},
                       {'target': 'optax:constant_schedule', 'value': 0.1}),
         'boundaries': ('1 epoch',)},
        optax.join_schedules(
            [optax.linear_schedule(0.0, 0.1, 5), optax.constant_schedule(0.1)], [5]
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', OPTAX)
def test_schedules_of_optax(name: str) -> None:
    """E1, E3, E5: any of them by its name, with durations where it takes steps."""
    arguments, expected = OPTAX[name]
    assert_same(from_config({'target': f'optax:{name}', **arguments}), expected)


def test_every_schedule_of_optax_is_shown() -> None:
    names = {name for name in dir(optax.schedules) if name.endswith(('_schedule', '_schedules'))}
    public = {name for name in names if not name.startswith('_')}
    assert public | {'exponential_decay'} == set(OPTAX)


def test_a_rate_that_is_warmed_up_and_annealed_by_epochs() -> None:
    """E1: the numbers of the guide: ten steps an epoch, two of ten epochs of warm-up, base 0.1."""
    node = {
        'target': 'optax:warmup_cosine_decay_schedule', 'init_value': 0.0, 'peak_value': 0.1,
        'warmup_steps': '2 epochs', 'decay_steps': '10 epochs',
    }  # fmt: skip
    made = load_and_build(CONFIG, optimizer__learning_rate=node, data__batch_size=16, **SMALL)
    assert made.clock.steps_per_epoch == 10
    schedule = made.optimizer.learning_rate
    assert schedule is not None
    found = [float(schedule(step)) for step in (0, 10, 19, 20, 60, 100)]
    assert found == pytest.approx([0.0, 0.05, 0.095, 0.1, 0.05, 0.0], abs=1e-7)


@pytest.mark.parametrize('warmup', ['2 epochs', 100])
def test_a_warm_up_that_is_longer_than_the_run(warmup: Any) -> None:
    node = {
        'target': 'optax:warmup_cosine_decay_schedule', 'init_value': 0.0, 'peak_value': 0.1,
        'warmup_steps': warmup, 'decay_steps': '100%',
    }  # fmt: skip
    scaled = {'target': 'trainer.step.schedules:scaled', 'schedule': node, 'factor': 0.5}
    options = {**SMALL, 'train_for': '5 steps'}
    for rate, path in ((node, 'learning_rate'), (scaled, 'learning_rate.schedule')):
        words = rf'config.optimizer.{path}.warmup_steps: .* the 5 steps of config.optimizer.{path}'
        with pytest.raises(UserError, match=words):
            load_and_build(CONFIG, optimizer__learning_rate=rate, **options)


LEGACY: dict[str, tuple[dict[str, Any], Schedule]] = {
    'constant': ({'warmup_length': 2}, optax.warmup_constant_schedule(0.0, 0.1, 10)),
    'stepped': (
        {'lr_sched_steps': ((3, 0.1), (6, 0.01), (8, 0.001))},
        optax.piecewise_constant_schedule(0.1, {15: 0.1, 30: 0.1, 40: 0.1}),
    ),
    'cosine': ({'halfcos_epochs': 10}, optax.cosine_decay_schedule(0.1, 50)),
}


@pytest.mark.parametrize('name', LEGACY)
def test_the_legacy_schedules_and_their_successors(name: str) -> None:
    """E3: those of `flax.training`, which a config can still name, are optax's."""
    arguments, successor = LEGACY[name]
    function = f'create_{name}_learning_rate_schedule'
    node = {
        'target': f'flax.training.lr_schedule:{function}',
        'base_learning_rate': 0.1, 'steps_per_epoch': '1 epoch', **arguments,
    }  # fmt: skip
    found = from_config(node)
    assert_same(found, getattr(lr_schedule, function)(0.1, 5, **arguments))
    # The legacy one steps down in the step after an epoch's first, optax in the first.
    for step in set(STEPS) - {15, 30, 40}:
        assert float(found(step)) == pytest.approx(float(successor(step)), rel=1e-5, abs=1e-8)


def test_roots_and_factors() -> None:
    """E3: what optax does not have."""
    node = {'target': 'trainer.step.schedules:rsqrt', 'peak_value': 0.1, 'warmup_steps': '1 epoch'}
    schedule = from_config(node)
    found = [float(schedule(step)) for step in (0, 1, 5, 20, 45)]
    assert found == pytest.approx([0.0, 0.02, 0.1, 0.05, 0.1 / 3])
    half = from_config({
        'target': 'trainer.step.schedules:scaled', 'factor': 0.5, 'schedule': node,
    })  # fmt: skip
    assert_same(half, lambda step: 0.5 * schedule(step))
    with pytest.raises(ValueError, match='warmup_steps: expected at least 1'):
        schedules.rsqrt(0.1, 0)


def test_what_is_logged_is_what_was_applied(tmp_path: pathlib.Path) -> None:
    """E2, E5: in each row the rate of the update just made, here an exponential growth."""
    node = {
        'target': 'optax:exponential_decay', 'init_value': 0.01, 'transition_steps': 1000,
        'decay_rate': float(np.e),
    }  # fmt: skip
    options = {**SMALL, 'train_for': '10 steps', 'log__every': '1 steps'}
    made = load_and_build(CONFIG, optimizer__learning_rate=node, **options)
    Trainer(made, str(tmp_path)).fit()
    rates = [row['train/learning_rate'] for row in command.rows(tmp_path)]
    assert rates == pytest.approx([0.01 * np.exp(step * 1e-3) for step in range(10)], rel=1e-6)
