# SPDX-License-Identifier: Apache-2.0
"""Runs of two processes that fail: together, or one of them alone."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from typing import Any

import clu.metrics
import flax.struct
import jax
import pytest

from tests import command
from tests.parallel.group import finish, start
from trainer.hooks import Event
from trainer.tasks import Classification
from trainer.tasks.metrics import WeightedMean

SHORT = (
    '--config.train_for=60steps',
    '--config.log.every=10steps',
    '--config.checkpoint.every=50steps',
    '--config.evals.test.every=20steps',
)


@dataclasses.dataclass(frozen=True)
class Tracker:
    """A hook that fails in one process; the steps are slow enough for all to agree on one."""

    number: int

    def __call__(self, event: Event) -> None:
        if event.kind == 'log' and event.step == 20 and jax.process_index() == self.number:
            raise OSError('the tracker is gone')
        if event.kind == 'log' and event.step >= 20:
            time.sleep(0.2)


def note(event: Event) -> None:
    """Another hook, which does not fail."""
    if event.kind in ('log', 'end'):
        name = f'{event.workdir}/seen.{jax.process_index()}'
        with open(name, 'a') as file:
            print(event.kind, event.step, event.status, file=file)


# The processes in which an evaluation fails.
FAILING = set(map(int, os.environ.get('FAILING', '0,1').split(',')))


@flax.struct.dataclass
class Fragile(WeightedMean):
    """A metric that can be computed only without data."""

    def compute(self) -> Any:
        if self.weight > 0 and jax.process_index() in FAILING:
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


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, 1])
def test_a_hook_that_fails_in_one_process_stops_all_with_everything_saved(
    number: int, tmp_path: pathlib.Path
) -> None:
    hooks = {'tracker': {'target': f'{__name__}:Tracker', 'number': number}}
    # Without another hook, the process whose hook has failed must still take part in the exchange
    # of the values of hooks at the evaluation of the same step.
    if number == 0:
        hooks['note'] = {'ref': f'{__name__}:note'}
    long = ('--config.train_for=600steps', '--config.checkpoint.every=500steps')
    args = (*SHORT, *long, f'--config.hooks={json.dumps(hooks)}')
    codes, _, errors = finish(start(2, tmp_path, *args))
    assert codes[number] == 1 and 'the tracker is gone' in errors[number], errors
    assert codes[1 - number] == 75, errors
    assert f'process {number}: OSError: the tracker is gone' in errors[1 - number]
    (step,) = saved_steps(tmp_path)
    assert 20 <= step < 500
    result, run = command.result(tmp_path), json.loads((tmp_path / 'run.json').read_text())
    assert (result['status'], result['step']) == ('failed', step) == (run['status'], run['step'])
    assert 'the tracker is gone' in result['error']['message']
    if number == 1:
        return
    # The other hook was called until the end, in both.
    seen = [(tmp_path / f'seen.{i}').read_text().splitlines() for i in range(2)]
    expected = [*(f'log {at} None' for at in range(10, step + 1, 10)), f'end {step} failed']
    assert seen == [expected, expected]


@pytest.mark.slow
def test_an_evaluation_that_fails_in_all_processes_loses_no_step(tmp_path: pathlib.Path) -> None:
    task = f'--config.evals.test.task={json.dumps({"target": f"{__name__}:Measuring"})}'
    codes, _, errors = finish(start(2, tmp_path, *SHORT, task))
    assert codes == [1, 1] and all('no such metric' in text for text in errors), errors
    assert saved_steps(tmp_path) == [20]
    assert command.result(tmp_path)['status'] == 'failed'


@pytest.mark.slow
def test_an_evaluation_that_fails_in_one_process_ends_the_other(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('FAILING', '1')
    task = f'--config.evals.test.task={json.dumps({"target": f"{__name__}:Measuring"})}'
    long = ('--config.train_for=60000steps', '--config.log.every=1000steps')
    codes, _, errors = finish(start(2, tmp_path, *SHORT, *long, task))
    assert codes == [75, 1] and 'no such metric' in errors[1], (codes, errors)
    assert saved_steps(tmp_path) == []
    assert command.result(tmp_path)['status'] == 'failed'


@pytest.mark.slow
def test_all_processes_report_a_diverged_run(tmp_path: pathlib.Path) -> None:
    """With the first non-finite step, although they check it later."""
    rate = '--config.optimizer.learning_rate=1e30'
    codes, outputs, errors = finish(start(2, tmp_path, *SHORT, rate))
    assert codes == [1, 1], (outputs, errors)
    assert all('First non-finite step: 2' in text for text in errors), errors
    assert command.result(tmp_path)['status'] == 'diverged'
    assert saved_steps(tmp_path) == []
