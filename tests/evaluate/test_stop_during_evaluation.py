# SPDX-License-Identifier: Apache-2.0
"""A run that is asked to stop during an evaluation ends at once; the next start repeats it."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import signal
from typing import Any

import pytest

from tests import command
from tests.evaluate.test_evaluator import Linear, evaluator_of, state_of
from tests.evaluate.watched import override
from trainer.data.mnist import MNIST
from trainer.evaluate.evaluator import Stopped
from trainer.experiment import load_and_build
from trainer.parallel.signals import StopRequest
from trainer.trainer import Trainer

# The evaluation reads 1, 2, 4, ... of its 64 batches at a time.
COMMON = (
    command.MLP,
    *command.SMALL,
    '--config.train_for=50steps',
    '--config.log.every=10steps',
    '--config.evals.test.data.source.limit=64',
    '--config.evals.test.data.batch_size=1',
    '--config.checkpoint.keep_last=1',
    '--config.checkpoint.best={"metric": "eval/test/loss", "mode": "max"}',
)
PERIODIC = ('--config.evals.test.every=20steps', '--config.checkpoint.every=20steps')
FINAL = ('--config.evals.test.every=never', '--config.checkpoint.every=never')


def test_should_stop_is_called_before_each_batch() -> None:
    asked = itertools.count()
    evaluator = evaluator_of(Linear(), MNIST('test', limit=100), 8, 8)
    with pytest.raises(Stopped):
        evaluator.run(state_of(Linear(), (28, 28, 1)), should_stop=lambda: next(asked) == 3)
    assert next(asked) == 4


@pytest.mark.parametrize(
    ('options', 'step', 'evaluated'),
    [(PERIODIC, 20, [20, 40, 50]), (FINAL, 50, [50])],
)
@pytest.mark.parametrize(
    ('number', 'code'),
    [(signal.SIGTERM, 42), (signal.SIGINT, 130)],
)
@pytest.mark.slow
def test_a_signal_during_an_evaluation(
    tmp_path: pathlib.Path,
    options: tuple[str, ...],
    step: int,
    evaluated: list[int],
    number: signal.Signals,
    code: int,
) -> None:
    workdir, whole = tmp_path / 'run', tmp_path / 'whole'
    # The first call is that of the check before the training begins.
    args = (*COMMON, *options, override(tmp_path, hold_at=4), f'--workdir={workdir}')
    process = command.start(*args)
    command.wait_for((tmp_path / 'begun').exists)
    process.send_signal(number)
    (tmp_path / 'go').touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    stopped = command.result(workdir)
    assert stopped['step'] == step
    assert stopped['status'] == {42: 'preempted', 130: 'interrupted'}[code]
    assert not any('eval/test/loss' in row for row in command.rows(workdir))

    again = command.run(*args)
    assert again.code == 0, again.err
    assert command.run(*COMMON, *options, f'--workdir={whole}').code == 0
    rows = command.rows(workdir)
    assert [row['step'] for row in rows if 'eval/test/loss' in row] == evaluated
    assert rows == command.rows(whole)
    mine, other = command.result(workdir), command.result(whole)
    assert mine['status'] == 'finished'
    assert (mine['digest'], mine['data_digest']) == (other['digest'], other['data_digest'])
    # A step that was evaluated after its save is as good a best step as any other.
    kept = [sorted(p.name for p in (d / 'checkpoints').iterdir()) for d in (workdir, whole)]
    assert kept[0] == kept[1]
    assert 'has already finished' in command.run(*args).out


@pytest.mark.slow
def test_a_stop_before_the_initial_evaluations_runs_no_step() -> None:
    """An evaluation due at the step of a stop stays due until it has run at that step."""
    options: dict[str, Any] = {
        'train_for': '30 steps', 'evals__test__every': '20 steps', 'data__source__limit': 640,
        'evals__test__data__source__limit': 64,
    }  # fmt: skip
    stop = StopRequest()

    def stop_at_20(event: Any) -> None:
        if (event.kind, event.step) == ('log', 20):
            stop.signal = signal.SIGTERM

    experiment = load_and_build(
        str(command.ROOT / 'configs' / 'mnist_mlp.py'), **options, log__every='20 steps'
    )
    hooks = {'stop': stop_at_20}
    trainer = Trainer(dataclasses.replace(experiment, hooks=hooks), stop=stop)
    for _ in range(2):
        result = trainer.fit()
        assert (result.status, result.step) == ('preempted', 20)
        assert 'eval/test/loss' not in result.metrics
    stop.signal = None
    first = trainer.fit(max_steps=1)
    assert (first.status, first.step) == ('paused', 21)
    assert 'eval/test/loss' in first.metrics
