# SPDX-License-Identifier: Apache-2.0
"""Failing saves are reported soon, with the cause; only permanent errors end the run."""

from __future__ import annotations

import errno
import json
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from tests import command
from tests.checkpoint.examples import Delayed, Unwritable, abstract, state
from trainer.checkpoint import writing
from trainer.checkpoint.errors import SaveError, first_line, is_temporary
from trainer.checkpoint.manager import Checkpoints, Retention

# TensorStore calls back into a loop that the first failure has closed.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def failing(directory: pathlib.Path, error: Exception) -> Checkpoints:
    """Checkpoints with one good save, and a second one that has failed in the background."""
    checkpoints = Checkpoints(directory, Retention())
    checkpoints.save(1, state(1), {})
    checkpoints.save(2, state(2), {'bad': Unwritable(error)})
    assert checkpoints._in_flight is not None
    assert checkpoints._in_flight.future.exception() is not None
    return checkpoints


def eio() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize('notice', ['check', 'wait', 'close', 'save'])
def test_a_permanent_failure_is_an_error_with_the_cause(
    tmp_path: pathlib.Path, notice: str
) -> None:
    checkpoints = failing(tmp_path, no_space())
    with pytest.raises(SaveError) as error:
        if notice == 'save':
            checkpoints.save(3, state(3), {})
        else:
            getattr(checkpoints, notice)()
    assert str(error.value) == (
        f'the save of step 2 in {tmp_path} failed (OSError: [Errno 28] No space left on device).\n'
        'Fix the cause; running the same command again resumes from step 1.'
    )
    assert error.value.exit_code == 1
    # It was reported once, and nothing was retried.
    checkpoints.close()
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize('notice', ['check', 'save'])
def test_a_temporary_failure_is_a_warning_and_the_next_save_tries_again(
    tmp_path: pathlib.Path, notice: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = failing(tmp_path, eio())
    with caplog.at_level(logging.WARNING, 'trainer'):
        if notice == 'check':
            checkpoints.check()
            assert not checkpoints.has(2)
        checkpoints.save(3, state(3), {})
    (record,) = (r for r in caplog.records if r.name == 'trainer')
    assert 'the save of step 2' in record.message and 'Input/output error' in record.message
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]
    assert int(checkpoints.restore(3, abstract(state()))['count']) == 3


def test_at_the_end_every_failure_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SaveError, match='Input/output error'):
        failing(tmp_path, eio()).close()


def test_a_failed_step_can_be_saved_again(tmp_path: pathlib.Path) -> None:
    before = set(threading.enumerate())
    checkpoints = failing(tmp_path, TypeError('not JSON'))
    with pytest.raises(SaveError, match='TypeError: not JSON'):
        checkpoints.check()
    # Orbax's threads for the other parts of that step still write them.
    command.wait_for(lambda: set(threading.enumerate()) <= before)
    checkpoints.save(2, state(20), {})
    checkpoints.close()
    assert int(checkpoints.restore(2, abstract(state()))['count']) == 20


def test_checking_a_save_in_progress_does_not_wait(tmp_path: pathlib.Path) -> None:
    checkpoints, delayed = Checkpoints(tmp_path, Retention()), Delayed(x=1)
    checkpoints.check()
    checkpoints.save(1, state(), {'delayed': delayed})
    assert delayed.reached.wait(60)
    checkpoints.check()
    assert checkpoints.has(1) and checkpoints.steps() == []
    delayed.release.set()
    checkpoints.wait()
    checkpoints.check()
    assert checkpoints.steps() == [1]


def test_an_unwritable_directory_is_reported_at_once(tmp_path: pathlib.Path) -> None:
    """Without the check, Orbax waits ten minutes for the directory that it could not create."""
    checkpoints = Checkpoints(tmp_path / 'checkpoints', Retention())
    checkpoints.save(1, state(), {})
    checkpoints.wait()
    (tmp_path / 'checkpoints').rename(tmp_path / 'moved')
    (tmp_path / 'checkpoints').write_text('a file')
    checkpoints.save(2, state(), {})
    with pytest.raises(SaveError, match='resumes from the beginning: there is no checkpoint'):
        checkpoints.wait()


def test_no_thread_waits_for_a_deleted_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax's threads would wait five minutes for the directory of the step."""
    before = set(threading.enumerate())
    directory = tmp_path / 'checkpoints'
    checkpoints = Checkpoints(directory, Retention())
    checkpoints.save(1, state(), {})
    checkpoints.wait()
    check_writable = writing.check_writable

    def check_and_spoil(path: Any) -> None:
        check_writable(path)
        directory.rename(tmp_path / 'moved')
        directory.write_text('a file')

    monkeypatch.setattr(writing, 'check_writable', check_and_spoil)
    checkpoints.save(2, state(), {})
    with pytest.raises(SaveError, match='Not a directory'):
        checkpoints.close()
    command.wait_for(lambda: set(threading.enumerate()) <= before, secs=20)


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (eio(), True),
        (TimeoutError(errno.ETIMEDOUT, 'timed out'), True),
        (ValueError("UNKNOWN: failed [os_error_code='116']"), True),
        (no_space(), False),
        (PermissionError(errno.EACCES, 'denied'), False),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"), False),
        (TypeError('a bug'), False),
    ],
)
def test_is_temporary(error: Exception, expected: bool) -> None:
    assert is_temporary(error) == expected


@pytest.mark.parametrize(
    'details',
    ['\nand pages', " [os_error_code='28'] [tensorstore_spec='{}']", '. See full TensorStore: {}'],
)
def test_details_are_shortened_to_a_line_with_the_cause(details: str) -> None:
    text = first_line(ValueError('start ' + 'x' * 900 + ' the cause' + details))
    assert text.startswith('ValueError: start x') and text.removesuffix('.').endswith('x the cause')
    assert len(text) < 330
    assert first_line(KeyError()) == 'KeyError: '


@pytest.mark.slow
def test_a_full_disk_ends_the_run(tmp_path: pathlib.Path) -> None:
    """No file may grow beyond 100 kB, and the state is 400."""
    workdir = tmp_path / 'run'
    args = [
        command.MLP, *command.SMALL, f'--workdir={workdir}', '--config.train_for=50000steps',
        '--config.checkpoint.every=2000steps', '--config.log.every=100steps',
        '--config.evals={}', '--config.log.tensorboard=False',
    ]  # fmt: skip
    python = ['bash', '-c', 'ulimit -f 100; exec "$@"', '-', sys.executable]
    done = subprocess.run(
        [*python, '-m', 'trainer.main', *args],
        cwd=command.ROOT,
        env={**os.environ, 'XLA_FLAGS': command.xla_flags()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f'Error: the save of step 2000 in {workdir}/checkpoints failed (')
    assert 'File too large' in done.stderr
    assert 'Traceback' not in done.stderr
    assert done.stderr.count('failed') == 1
    assert command.rows(workdir)[-1]['step'] < 50_000
    result = command.result(workdir)
    assert (result['status'], result['error']['type']) == ('failed', 'SaveError')


EVENTS: list[tuple[str, int]] = []


def spoil(event: Any) -> None:
    """Replaces the directory of checkpoints by a file, and waits until the save has failed."""
    EVENTS.append((event.kind, event.step))
    if event.kind == 'start':
        (pathlib.Path(event.workdir) / 'checkpoints').write_text('a file')
    if event.kind == 'save':
        command.wait_for(
            lambda: not any(t.name.startswith('checkpoint') for t in threading.enumerate())
        )


def spoil_and_stay(event: Any) -> None:
    """Breaks saves like `spoil`, and starts a thread that runs for much too long."""
    if event.kind == 'start':
        threading.Thread(target=time.sleep, args=(300,)).start()
    spoil(event)


@pytest.mark.slow
def test_a_process_whose_save_has_failed_waits_for_no_thread(tmp_path: pathlib.Path) -> None:
    hooks = f'--config.hooks={{"spoil": {{"ref": "{__name__}:spoil_and_stay"}}}}'
    ended = command.run(
        command.MLP, *command.SMALL, f'--workdir={tmp_path}', hooks,
        '--config.train_for=50steps', '--config.evals={}',
    )  # fmt: skip
    assert ended.code == 1
    assert ended.err.startswith('Error: the save of step 50')
    assert 'Traceback' not in ended.err
    assert ended.secs < 120


@pytest.mark.slow
def test_the_next_log_event_ends_the_run(tmp_path: pathlib.Path) -> None:
    from trainer.experiment import load_and_build
    from trainer.trainer import Trainer

    EVENTS.clear()
    experiment = load_and_build(
        str(command.ROOT / 'configs' / 'mnist_mlp.py'),
        train_for='500 steps', checkpoint__every='25 steps', log__every='10 steps',
        evals__test__every='never', data__source__limit=640,
        hooks={'spoil': {'ref': f'{__name__}:spoil'}},
    )  # fmt: skip
    with pytest.raises(SaveError, match='the save of step 25'):
        Trainer(experiment, str(tmp_path)).fit()
    assert EVENTS == [('start', 0), ('log', 10), ('log', 20), ('save', 25), ('end', 30)]
    assert json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])['step'] <= 30
