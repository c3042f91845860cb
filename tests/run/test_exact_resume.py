# SPDX-License-Identifier: Apache-2.0
"""Interrupted runs that are started again end exactly as uninterrupted ones."""

from __future__ import annotations

import pathlib
import random
import signal

import pytest

from tests import command

LENGTH = (
    '--config.train_for=6000steps',
    '--config.checkpoint.every=700steps',
    '--config.log.every=30steps',
    '--config.model.dropout_rate=0.1',
    '--config.model.batch_norm=true',
)


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The work directory of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    command.train(workdir, *LENGTH)
    return workdir


def assert_same_run(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    assert command.result(workdir)['step'] == 6000
    command.assert_same_run(workdir, whole)


def interrupt(workdir: pathlib.Path, number: signal.Signals, after_rows: int) -> int:
    process = command.start(command.MLP, *command.SMALL, f'--workdir={workdir}', *LENGTH)
    command.wait_for(command.rows_written(workdir, after_rows))
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.slow
def test_runs_killed_at_random_moments_resume_exactly(
    tmp_path: pathlib.Path, whole: pathlib.Path
) -> None:
    workdir = tmp_path / 'run'
    for _ in range(3):
        interrupt(workdir, signal.SIGKILL, random.randint(1, 150))
    command.train(workdir, *LENGTH)
    assert_same_run(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('number', 'code'),
    [pytest.param(signal.SIGTERM, 42, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_stopped_runs_save_first(
    tmp_path: pathlib.Path, whole: pathlib.Path, number: signal.Signals, code: int
) -> None:
    workdir = tmp_path / 'run'
    assert interrupt(workdir, number, 10) == code
    stopped = command.result(workdir)
    assert stopped['status'] == {42: 'preempted', 130: 'interrupted'}[code]
    log = (workdir / 'log.txt').read_text().splitlines()
    assert any(line.endswith('Run the same command again to continue.') for line in log)
    assert 0 < stopped['step'] < 6000
    again = command.train(workdir, *LENGTH)
    assert f'resuming from step {stopped["step"]:,}' in again.out
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_a_resumed_run_prints_its_step_and_continues(tmp_path: pathlib.Path) -> None:
    process = command.start(command.MLP, *command.SMALL, f'--workdir={tmp_path}', *LENGTH)
    command.wait_for(command.rows_written(tmp_path, 1))
    process.send_signal(signal.SIGUSR2)
    command.wait_for(command.rows_written(tmp_path, 5))
    process.send_signal(signal.SIGTERM)
    [(_, err)] = command.ends(process)
    assert process.returncode == 42
    assert 'trainer/trainer.py' in err
    assert 'Current thread' in err


@pytest.mark.slow
def test_a_finished_run_reports_its_result(whole: pathlib.Path) -> None:
    before = (whole / 'metrics.jsonl').read_bytes()
    again = command.train(whole, *LENGTH)
    assert 'has already finished at step 6,000' in again.out
    assert (whole / 'metrics.jsonl').read_bytes() == before


@pytest.mark.slow
def test_extending_a_run_equals_a_longer_run(tmp_path: pathlib.Path) -> None:
    options = ('--config.log.every=10steps', '--config.evals={}')
    command.train(tmp_path / 'two', '--config.train_for=50steps', *options)
    command.train(tmp_path / 'two', '--config.train_for=100steps', *options)
    command.train(tmp_path / 'one', '--config.train_for=100steps', *options)
    one, two = command.result(tmp_path / 'one'), command.result(tmp_path / 'two')
    assert one['digest'] == two['digest']
    assert one['data_digest'] == two['data_digest']


@pytest.mark.slow
def test_extending_a_schedule_that_ends_with_the_run_is_refused(tmp_path: pathlib.Path) -> None:
    schedule = (
        '--config.optimizer.learning_rate={"target": "optax:cosine_decay_schedule", '
        '"init_value": 0.1, "decay_steps": "100%"}'
    )
    command.train(tmp_path / 'run', '--config.train_for=30steps', schedule)
    longer = (command.MLP, *command.SMALL, f'--workdir={tmp_path / "run"}', schedule)
    refused = command.run(*longer, '--config.train_for=60steps')
    assert refused.code == 2
    assert 'optimizer.learning_rate.decay_steps' in refused.err
    assert '30 -> 60' in refused.err
    allowed = command.run(*longer, '--config.train_for=60steps', '--allow_config_change')
    assert allowed.code == 0, allowed.err


@pytest.mark.slow
def test_another_config_is_refused_with_its_changes(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / 'run'
    command.train(workdir, '--config.train_for=10steps')
    base = (command.MLP, *command.SMALL, f'--workdir={workdir}', '--config.train_for=20steps')
    refused = command.run(*base, '--config.optimizer.learning_rate=0.5')
    assert refused.code == 2
    assert 'optimizer.learning_rate  0.01 -> 0.5' in refused.err
    assert 'Traceback' not in refused.err
    harmless = command.run(*base, '--config.log.every=7steps')
    assert harmless.code == 0, harmless.err
    assert 'log.every' in harmless.out


@pytest.mark.slow
def test_an_evaluation_prints_changes_of_the_config(whole: pathlib.Path) -> None:
    args = ('--mode=eval', f'--workdir={whole}', *LENGTH, '--config.optimizer.momentum=0.5')
    finished = command.run(command.MLP, *command.SMALL, *args)
    assert finished.code == 0
    assert (
        'differs from the one this run was trained with:\n  optimizer.momentum  0.9 -> 0.5\n'
        in finished.err
    )
    assert 'eval test: loss' in finished.out
