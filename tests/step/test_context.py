# SPDX-License-Identifier: Apache-2.0
"""The context of a step: facts about the optimizer are derived from the structure of the state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.step import tiny
from trainer.modules.functional import as_functional
from trainer.step.context import StateFacts, StepContext
from trainer.step.one_model import TrainStep
from trainer.step.optimizer import Optimizer
from trainer.tasks import Classification
from trainer.tasks.runner import TaskRunner

SPEC = {
    'x': jax.ShapeDtypeStruct((8, 8), jnp.float32),
    'label': jax.ShapeDtypeStruct((8,), jnp.int32),
}


def step_of(optimizer: Optimizer, **options: Any) -> TrainStep:
    task = TaskRunner.from_task(Classification(inputs='x'))
    model = as_functional(tiny.Net())
    return TrainStep(StepContext(model=model, task=task, optimizer=optimizer, seed=0, **options))


def facts_of(optimizer: Optimizer, replicated: Any = None) -> StateFacts:
    step = step_of(optimizer)
    state = jax.eval_shape(lambda: step.init(SPEC))
    facts = step.with_state(state, replicated).context.facts
    assert facts is not None
    return facts


def test_defaults_are_those_of_a_plain_step() -> None:
    context = step_of(Optimizer(base=optax.sgd(0.1))).context
    assert (context.accumulate, context.shards, context.facts) == (1, 1, None)
    assert (context.ema_decay, context.loss_scale, context.log) == (None, None, None)
    assert (context.stops, context.tracks_health, context.sweeps) == (True, False, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.seed = 1  # type: ignore[misc]


def test_frozen_parameters_are_marked() -> None:
    facts = facts_of(Optimizer(base=optax.sgd(0.1), freeze=('Dense_0/.*',)))
    assert facts.frozen == {
        'Dense_0': {'bias': True, 'kernel': True}, 'Dense_1': {'bias': False, 'kernel': False},
    }  # fmt: skip


@pytest.mark.parametrize(
    ('base', 'expected'),
    [
        (optax.adam(0.1), (False, False, False)),
        (optax.apply_if_finite(optax.adam(0.1), 3), (True, False, False)),
        (
            optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=2)),
            (False, True, False),
        ),
        (
            optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01), opaque_mode=True),
            (False, False, True),
        ),
    ],
)
def test_what_the_optimizer_does_is_read_from_its_state(
    base: optax.GradientTransformation, expected: tuple[bool, bool, bool]
) -> None:
    facts = facts_of(Optimizer(base=base))
    found = (facts.handles_non_finite, facts.scales_rates, facts.needs_extra_arguments)
    assert found == expected


@pytest.mark.parametrize(
    ('replicated', 'expected'),
    [(None, False), ({'a': True}, True), ({'a': True, 'b': False}, False)],
)
def test_all_are_replicated_only_if_it_is_known_of_each(replicated: Any, expected: bool) -> None:
    assert facts_of(Optimizer(base=optax.sgd(0.1)), replicated).all_replicated is expected
