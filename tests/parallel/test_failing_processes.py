# SPDX-License-Identifier: Apache-2.0
"""Runs of two processes that fail: together, or one of them alone."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import clu.metrics
import flax.struct
import jax
import pytest

from tests import command
from tests.parallel.group import finish, start
from trainer.events import Event
from trainer.step.metrics import WeightedMean
from trainer.step.tasks import Classification

SHORT = (
    '--config.train_for=60steps',
    '--config.log.every=10steps',
    '--config.checkpoint.every=50steps',
    '--config.evals.test.every=20steps',
)


@dataclasses.dataclass(frozen=True)
class Tracker:
    """A hook that fails in one process."""

    number: int

    def __call__(self, event: Event) -> None:
        if event.kind == 'log' and event.step == 20 and jax.process_index() == self.number:
            raise OSError('the tracker is gone')


@flax.struct.dataclass
class Fragile(WeightedMean):
    """A metric that can be computed only without data."""

    def compute(self) -> Any:
        if self.weight > 0:
            raise ValueError('no such metric')
        return super().compute()

    @classmethod
    def from_model_output(cls, *, loss: Any, weights: Any, **_: Any) -> Any:
        mean = WeightedMean.from_model_output(loss, weights)
        return cls(total=mean.total, weight=mean.weight)


class Measuring(Classification):
    metrics = clu.metrics.Collection.create(fragile=Fragile)  # type: ignore[assignment]


def saved_steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob('checkpoints/*'))


@pytest.mark.parametrize('number', [0, 1])
def test_a_hook_that_fails_in_one_process_stops_all_with_everything_saved(
    number: int, tmp_path: pathlib.Path
) -> None:
    hook = {'target': f'{__name__}:Tracker', 'number': number}
    hooks = f'--config.hooks={json.dumps({"tracker": hook})}'
    codes, _, errors = finish(start(2, tmp_path, *SHORT, hooks))
    assert codes[number] == 1 and 'the tracker is gone' in errors[number], errors
    assert codes[1 - number] == 42, errors
    (step,) = saved_steps(tmp_path)
    assert 20 <= step < 50
    if number == 0:
        assert command.result(tmp_path)['status'] == 'failed'


def test_an_evaluation_that_fails_in_all_processes_costs_no_step(tmp_path: pathlib.Path) -> None:
    task = f'--config.evals.test.task={json.dumps({"target": f"{__name__}:Measuring"})}'
    codes, _, errors = finish(start(2, tmp_path, *SHORT, task))
    assert codes == [1, 1] and all('no such metric' in text for text in errors), errors
    assert saved_steps(tmp_path) == [20]
    assert command.result(tmp_path)['status'] == 'failed'


def test_all_processes_find_that_a_run_has_diverged(tmp_path: pathlib.Path) -> None:
    """In the step that it began, although they look at it later."""
    rate = '--config.optimizer.learning_rate=1e30'
    codes, outputs, errors = finish(start(2, tmp_path, *SHORT, rate))
    assert codes == [1, 1], (outputs, errors)
    assert all('First non-finite step: 2' in text for text in errors), errors
    assert command.result(tmp_path)['status'] == 'diverged'
    assert saved_steps(tmp_path) == []
