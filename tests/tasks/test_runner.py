# SPDX-License-Identifier: Apache-2.0
"""The runner of a task: signatures, weights, sums of losses and range checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import trainer_in
from trainer.config.errors import UserError, error_notes
from trainer.input.fields import MASK
from trainer.tasks import TaskOutput
from trainer.tasks.checks import Check
from trainer.tasks.metrics import WeightedMean
from trainer.tasks.runner import (
    TaskRunner,
    compute_metrics,
    loss_sums,
    mean_loss,
    run_checks,
    safe_inverse,
)
from trainer.trainer import Trainer


class Own:
    """A task with its own metric collection, whose inputs may have any name."""

    def __init__(self, name: str):
        self.metrics = clu.metrics.Collection.create(
            **{name: clu.metrics.Average.from_output('examples')}
        )

    def __call__(self, model: Any, batch: Any) -> TaskOutput:
        loss = model(batch['image']).sum(-1)
        return TaskOutput(loss=loss, metrics={'examples': loss})


def test_reported_names_of_a_collection_are_checked() -> None:
    with pytest.raises(UserError, match="names a metric 'examples', but this name is reserved"):
        TaskRunner.from_task(Own('examples'))
    experiment = dataclasses.replace(
        trainer_in(None).experiment, task=TaskRunner.from_task(Own('mean'))
    )
    Trainer(experiment).init_state()


def test_logged_loss_is_minimized_with_negative_weights() -> None:
    output = TaskOutput(loss=jnp.array([3.0, 5.0]), weights=jnp.array([1.0, -3.0]))
    totals, weights, _ = loss_sums(output)
    logged = WeightedMean.from_model_output(output.loss, output.weights)
    assert logged.compute() == totals['loss'] * safe_inverse(weights['loss']) == 6.0


@pytest.mark.parametrize(
    ('task', 'message'),
    [
        (lambda model, batch: model(batch['image']).sum(), 'returned a scalar'),
        (lambda model, batch: None, 'returned None'),
        (lambda model, batch: (1, 2, 3), r'returned \(int, int, int\)'),
        (
            lambda model, batch: (model(batch['image']).sum(-1), {'acc': jnp.ones(())}),
            r"the metric 'acc' of the task: expected an array with one value for each example",
        ),
        (
            lambda model, batch: (model(batch['image']).sum(-1), {'acc': {'a': jnp.ones(4)}}),
            "the metric 'acc' of the task",
        ),
    ],
)
def test_invalid_results_stop_compilation(task: Any, message: str) -> None:
    run = trainer_in(None)
    experiment = dataclasses.replace(run.experiment, task=TaskRunner.from_task(task))
    with pytest.raises(UserError, match=message):
        Trainer(experiment).compile()


def test_task_with_another_signature_is_rejected() -> None:
    with pytest.raises(UserError, match=r'must take \(model, batch\): too many positional'):
        TaskRunner.from_task(lambda batch: batch)


def weighted_task(model: Any, batch: Any) -> TaskOutput:
    """A task that returns weights; a label of 0 gives a loss that is not finite."""
    loss = model(1 / batch['label'])
    return TaskOutput(loss=loss, weights=batch['weight'], metrics={'half': loss / 2})


def double(x: Any) -> Any:
    return 2 * x


def test_padding_has_weight_0() -> None:
    runner = TaskRunner.from_task(lambda model, batch: model(batch['x']))
    output = runner(double, {'x': jnp.arange(4.0), MASK: jnp.array([True, True, False, True])})
    assert output.weights.tolist() == [1, 1, 0, 1]
    assert runner.measure(output).compute()['loss'] == pytest.approx(8 / 3)


def test_the_task_does_not_see_the_mask() -> None:
    seen = []

    def task(model: Any, batch: Any) -> Any:
        seen.append(sorted(batch))
        return model(batch['x'])

    runner = TaskRunner.from_task(task, transforms=(lambda batch: {**batch, 'y': batch['x']},))
    runner(double, {'x': jnp.arange(4.0), MASK: jnp.ones(4, bool)})
    assert seen == [['x', 'y']]


def test_examples_of_weight_0_affect_neither_loss_nor_gradient() -> None:
    batch = {'label': jnp.array([1.0, 0.0, 2.0]), 'weight': jnp.array([1.0, 0.0, 3.0])}
    runner = TaskRunner.from_task(weighted_task)

    def loss(scale: Any) -> Any:
        output = runner(lambda x: scale * x, batch)
        totals, weights, penalties = loss_sums(output)
        return mean_loss((totals, penalties), weights)

    value, gradient = jax.value_and_grad(loss)(2.0)
    assert (value, gradient) == (pytest.approx(5 / 4), pytest.approx(5 / 8))


def test_named_losses_have_weights_of_their_own() -> None:
    def task(model: Any, batch: Any) -> TaskOutput:
        x = model(batch['x'])
        return TaskOutput(loss={'a': x, 'b': -x}, weights={'a': batch['w']}, penalties={'p': 1.0})

    runner = TaskRunner.from_task(task)
    output = runner(double, {'x': jnp.array([1.0, 2.0]), 'w': jnp.array([1.0, 3.0])})
    totals, weights, penalties = loss_sums(output)
    assert mean_loss((totals, penalties), weights) == {'a': 14 / 4 + 1, 'b': -3 + 1}
    assert set(output.weights) == {'a', 'b', 'metrics'}
    assert compute_metrics(runner.measure(output)) == {'a_loss': 3.5, 'b_loss': -3.0}


def test_a_batch_of_padding_has_loss_0() -> None:
    assert safe_inverse(jnp.zeros(())) == 0
    assert jnp.isfinite(jax.grad(safe_inverse)(0.0))


@pytest.mark.parametrize(
    ('values', 'weights', 'number', 'value'),
    [
        ([0, 9, -1], [1, 1, 1], 0, 0),
        ([0, 10, 3], [1, 1, 1], 2, 10),
        ([0, 10, 3], [1, 0, 1], 0, 0),
        ([-2, 10, 3], [1, 1, 1], 2, -2),
        ([9.0005, 0.0, 0.0], [1, 1, 1], 0, 0),
        ([jnp.nan, 0.0, 0.0], [1, 1, 1], 2, jnp.nan),
    ],
)
def test_range_checks(values: Any, weights: Any, number: int, value: float) -> None:
    checks = {
        'b_label': Check(values=jnp.asarray(values), low=0, high=9, ignored=-1),
        'a_other': Check(values=jnp.zeros(3, jnp.uint8), low=-1, high=999),
    }
    found, wrong = run_checks(checks, jnp.asarray(weights, jnp.float32))
    assert int(found) == number
    np.testing.assert_equal(float(wrong), value)


def test_an_error_of_a_metric_names_it() -> None:
    @flax.struct.dataclass
    class Broken(clu.metrics.Average):
        def compute(self) -> Any:
            raise ValueError('too few')

    collection = clu.metrics.Collection.create(
        good=clu.metrics.Average.from_output('loss'), bad=Broken.from_output('loss')
    )
    metrics = collection.single_from_model_output(loss=jnp.ones(3))
    with pytest.raises(ValueError, match='too few') as caught:
        compute_metrics({'task': metrics})
    assert error_notes(caught.value) == ["Raised while computing the metric 'bad'"]
