# SPDX-License-Identifier: Apache-2.0
"""What a `clu.metrics.CollectingMetric` collects of a batch, and which it cannot collect."""

from __future__ import annotations

from typing import Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import pytest

from trainer.config.errors import UserError
from trainer.tasks.runner import TaskRunner
from trainer.tasks.task import TaskOutput

Collects = clu.metrics.CollectingMetric.from_outputs(('loss', 'pixels', 'mask'))


@flax.struct.dataclass
class Metrics(clu.metrics.Collection):
    """Its annotations are texts, because of the import above."""

    loss: clu.metrics.Average.from_output('loss')  # type: ignore[valid-type]
    all: Collects  # type: ignore[valid-type]


def runner(**outputs: Any) -> tuple[TaskRunner, TaskOutput]:
    def task(model: Any, batch: Any) -> TaskOutput:
        return TaskOutput(loss=batch['x'][:, 0], metrics=outputs)

    task.metrics = Metrics  # type: ignore[attr-defined]
    made = TaskRunner.from_task(task)
    return made, made(lambda x: x, {'x': jnp.ones((4, 3)), '_mask': jnp.arange(4) < 3})


def test_a_collection_is_divided() -> None:
    made, output = runner(pixels=jnp.zeros((4, 2)))
    assert made.collecting == (('all', Collects),)
    assert set(made.measure(output).compute()) == {'loss'}
    assert jax.tree.map(jnp.shape, made.collect(output)) == {
        'all': {'loss': (4,), 'pixels': (4, 2), 'mask': (4,)}
    }


def test_a_metric_that_collects_what_the_task_does_not_return() -> None:
    made, output = runner(other=jnp.zeros(4))
    with pytest.raises(UserError, match=r"'all' collects 'pixels', .* returns loss, mask, other"):
        made.collect(output)


def test_a_metric_that_collects_no_rows() -> None:
    made, output = runner(pixels=jnp.zeros((2, 2)))
    with pytest.raises(UserError, match=r"'pixels', which is float32\[2, 2\]; expected one entry"):
        made.collect(output)
