# SPDX-License-Identifier: Apache-2.0
"""The runner of a task: signatures, results and sums of losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import clu.metrics
import jax.numpy as jnp
import pytest

from tests.small import trainer_in
from trainer.config.errors import UserError
from trainer.tasks import TaskOutput
from trainer.tasks.metrics import WeightedMean
from trainer.tasks.runner import TaskRunner, loss_sums, safe_inverse
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
