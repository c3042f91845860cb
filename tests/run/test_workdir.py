# SPDX-License-Identifier: Apache-2.0
"""The files of a work directory."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest
from etils import epath

from tests import command
from trainer.checkpoint.errors import SaveError
from trainer.config import files
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.run import workdir as workdir_module
from trainer.run.workdir import Workdir
from trainer.trainer import Trainer


def refuse(constant: str) -> None:
    raise AssertionError(f'{constant} is not JSON')


def test_values_that_are_not_finite_are_null_in_the_result(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path)
    assert workdir.result() is None
    metrics = {'nan': math.nan, 'inf': math.inf, 'minus': -math.inf, 'one': 1.5, 'examples': 3}
    workdir.write_result('finished', 7, 'aa', 'bb', metrics)
    stored = json.loads((tmp_path / 'result.json').read_text(), parse_constant=refuse)
    finite = {'one': 1.5, 'examples': 3}
    assert stored['metrics'] == {'nan': None, 'inf': None, 'minus': None, **finite}
    result = workdir.result()
    assert result is not None
    assert (result['status'], result['step']) == ('finished', 7)
    assert all(math.isnan(result['metrics'].pop(name)) for name in ('nan', 'inf', 'minus'))
    assert result['metrics'] == finite


def test_an_unwritable_directory_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'the work directory .* is not writable: Not a directory'):
        Workdir(tmp_path / 'file' / 'run').create()
    with pytest.raises(UserError, match=r'the work directory .* is not writable: File exists'):
        Workdir(tmp_path / 'file').create()
    Workdir(tmp_path / 'a' / 'b').create()
    assert list((tmp_path / 'a' / 'b').iterdir()) == []


def test_a_full_disk_is_refused_and_nothing_is_left(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Any, content: bytes) -> None:
        path.write_text('')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(type(epath.Path(tmp_path)), 'write_bytes', fail)
    with pytest.raises(UserError, match='run is not writable: No space left on device'):
        Workdir(tmp_path / 'run').create()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / 'old').mkdir()
    with pytest.raises(UserError, match='old is not writable: No space left on device'):
        Workdir(tmp_path / 'old').create()
    assert list((tmp_path / 'old').iterdir()) == []


def test_checkpoints_that_cannot_be_written_are_found_at_the_start(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = type(epath.Path(tmp_path)).write_bytes

    def fail(path: Any, content: bytes) -> None:
        if path.parent.name == 'checkpoints':
            raise OSError(30, 'Read-only file system')
        write(path, content)

    (tmp_path / 'checkpoints').mkdir()
    monkeypatch.setattr(type(epath.Path(tmp_path)), 'write_bytes', fail)
    with pytest.raises(UserError, match='where the checkpoints go, is not writable: Read-only'):
        Workdir(tmp_path).create()


@pytest.mark.parametrize('failures', [1, 3])
def test_a_result_that_cannot_be_written_is_tried_again(
    failures: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = files.replace, []

    def fail(*args: Any) -> None:
        calls.append(args)
        if len(calls) <= failures:
            raise OSError(28, 'No space left on device')
        replace(*args)

    monkeypatch.setattr(files, 'replace', fail)
    monkeypatch.setattr(workdir_module, '_WAITS', (0.0, 0.0))
    workdir = Workdir(tmp_path)
    if failures == 1:
        workdir.write_result('finished', 7, 'aa', 'bb', {})
        assert (workdir.result() or {})['step'] == 7
        return
    with pytest.raises(SaveError, match=r'result\.json cannot be written: No space left'):
        workdir.write_result('finished', 7, 'aa', 'bb', {})


def test_a_run_locks_its_directory(tmp_path: pathlib.Path) -> None:
    other = Workdir(tmp_path)
    other.claim()
    experiment = load_and_build(str(command.ROOT / 'configs' / 'mnist_mlp.py'), train_for='2 steps')
    with pytest.raises(UserError, match='another run is training'):
        Trainer(experiment, str(tmp_path)).fit()
    other.release()


@pytest.mark.slow
def test_two_runs_do_not_share_a_directory(tmp_path: pathlib.Path) -> None:
    """The second run is told who holds the lock; ended and killed runs hold none."""
    steps = ('--config.train_for=100000steps', '--config.evals.test.every=never')
    first = command.start(command.MLP, *command.SMALL, f'--workdir={tmp_path}', *steps)
    try:
        command.wait_for(command.rows_written(tmp_path, 1))
        second = command.run(command.MLP, *command.SMALL, f'--workdir={tmp_path}', *steps)
        assert second.code == 2
        assert f'another run is training in {tmp_path} (process {first.pid} on ' in second.err
        assert 'Traceback' not in second.err
    finally:
        first.kill()
        first.communicate()
    third = command.start(command.MLP, *command.SMALL, f'--workdir={tmp_path}', *steps)
    try:
        seen = len(command.rows(tmp_path))
        command.wait_for(command.rows_written(tmp_path, seen + 1))
    finally:
        third.kill()
        third.communicate()


def test_a_directory_is_unlocked_after_the_run(tmp_path: pathlib.Path) -> None:
    one, other = Workdir(tmp_path), Workdir(tmp_path)
    one.claim()
    one.claim()
    with pytest.raises(UserError, match='another run is training'):
        other.claim()
    one.release()
    other.claim()
    other.release()


def starts(directory: pathlib.Path) -> list[tuple[str, int | None]]:
    found = json.loads((directory / 'run.json').read_text())['starts']
    return [(each['status'], each['step']) for each in found]


def test_run_json_lists_the_starts(tmp_path: pathlib.Path) -> None:
    for _ in range(2):
        workdir = Workdir(tmp_path)
        workdir.begin({}, {}, {'pid': 1})
        workdir.end_run('preempted', 30)
        workdir.release()
    Workdir(tmp_path).begin({}, {}, {'pid': 2})  # And is killed.
    workdir = Workdir(tmp_path)
    workdir.begin({}, {}, {'pid': 3})
    assert starts(tmp_path) == [('preempted', 30)] * 2 + [('failed', None), ('running', None)]
    workdir.release()
    workdir.end_run('finished', 40)  # It belongs to another run by now.
    assert starts(tmp_path)[-1] == ('running', None)


@pytest.mark.parametrize('text', ['', '[]', '{"git": null}', '{"starts": [1]}'])
def test_a_run_json_of_a_wrong_type_is_replaced(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / 'run.json').write_text(text)
    Workdir(tmp_path).begin({}, {}, {})
    assert starts(tmp_path) == [('running', None)]


def test_a_result_may_have_any_status(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path)
    workdir.write_result('diverged', 9, None, 'bb', {'train/loss': math.nan}, {'type': 'X'})
    result = workdir.result()
    assert result is not None
    assert math.isnan(result.pop('metrics')['train/loss'])
    assert result == {
        'status': 'diverged', 'step': 9, 'digest': None, 'data_digest': 'bb', 'error': {'type': 'X'}
    }  # fmt: skip
