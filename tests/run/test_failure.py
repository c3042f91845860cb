# SPDX-License-Identifier: Apache-2.0
"""What a failed run records: result.json, run.json, log.txt and debug.log."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from tests import command, small
from trainer.checkpoint.manager import CheckpointError, Checkpoints
from trainer.checkpoint.retention import Retention
from trainer.config.errors import UserError
from trainer.hooks import Event
from trainer.parallel import last_words
from trainer.run.failure import NonFiniteError
from trainer.trainer import Trainer

BROKEN = 500
SAID: list[dict[str, Any]] = []


class Broken:
    """A source with one unreadable example."""

    def __init__(self, bad: int = BROKEN):
        self.bad = bad
        self.spec: dict[str, Any] = {}

    def __len__(self) -> int:
        return 640

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        if (indices == self.bad).any():
            raise OSError(f'record {self.bad} is torn\n' + 'details\n' * 20)
        images = np.zeros((len(indices), 28, 28, 1), np.uint8)
        return {'image': images, 'label': np.zeros(len(indices), np.int32)}


def fail(event: Event) -> None:
    if (event.kind, event.step) == ('log', 20):
        raise ValueError('the hook failed')


def fail_after_save(event: Event) -> None:
    if event.kind == 'save':
        raise ValueError('after the save')


def interrupt(event: Event) -> None:
    if event.kind == 'log':
        raise KeyboardInterrupt


def refuse(event: Event) -> None:
    if event.kind == 'log':
        raise UserError('the hook wants another --config.log.every')


def leave(event: Event) -> None:
    if event.kind == 'log':
        last_words.record('failed', 'the process ends now')
        workdir = pathlib.Path(event.workdir or '')
        SAID.append({**command.result(workdir), 'run': run_json(workdir)['status']})


def trainer_in(workdir: pathlib.Path, hook: str | None = None, **overrides: Any) -> Trainer:
    options: dict[str, Any] = {'train_for': '40 steps', 'evals__test__every': 'never'}
    options['checkpoint__every'] = '1 epochs'
    if hook is not None:
        options['hooks'] = {'hook': {'ref': f'{__name__}:{hook}'}}
    return small.trainer_in(workdir, **{**options, **overrides})


def run_json(workdir: pathlib.Path) -> dict[str, Any]:
    return json.loads((workdir / 'run.json').read_text())


@pytest.mark.slow
def test_a_failing_hook_is_recorded(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match='the hook failed'):
        trainer_in(tmp_path, 'fail').fit()
    found = command.result(tmp_path)
    error = found.pop('error')
    assert found.pop('metrics')['train/loss'] > 0
    # The steps until then were saved before the run ended.
    checkpoints = Checkpoints(tmp_path / 'checkpoints', Retention())
    assert checkpoints.latest() == 20
    digests = {name: checkpoints.meta(20)[name] for name in ('digest', 'data_digest')}
    assert found == {'status': 'failed', 'step': 20, **digests}
    where = error.pop('where')
    assert where.startswith(f'{__file__}:')
    assert where.endswith(' in fail')
    assert error == {'type': 'ValueError', 'message': 'the hook failed', 'step': 20}
    run = run_json(tmp_path)
    assert (run['status'], run['step']) == ('failed', 20)
    assert run['start'] <= run['end']
    # The next start does not treat it as finished, and overwrites its result.
    trainer_in(tmp_path).fit()
    found = command.result(tmp_path)
    assert (found['status'], 'error' in found) == ('finished', False)
    run = run_json(tmp_path)
    assert [(each['status'], each['step']) for each in run['starts']] == [
        ('failed', 20),
        ('finished', 40),
    ]


@pytest.mark.slow
def test_the_result_has_the_digests_of_a_saved_step(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match='after the save'):
        trainer_in(tmp_path / 'failed', 'fail_after_save', checkpoint__every='20 steps').fit()
    trainer_in(tmp_path / 'whole', train_for='20 steps').fit()
    found, whole = (command.result(tmp_path / name) for name in ('failed', 'whole'))
    assert (found['status'], found['step']) == ('failed', 20)
    for name in ('digest', 'data_digest'):
        assert found[name] == whole[name]


@pytest.mark.slow
def test_a_failing_source_is_recorded(tmp_path: pathlib.Path) -> None:
    source = {'target': f'{__name__}:Broken'}
    with pytest.raises(OSError, match='torn'):
        trainer_in(tmp_path, data__source=source, log__every='1 steps').fit()
    found = command.result(tmp_path)
    assert found['status'] == 'failed'
    assert found['error']['type'] == 'OSError'
    lines = found['error']['message'].splitlines()
    assert lines[0] == f'record {BROKEN} is torn'
    assert lines[-1] == '...'
    assert len(lines) < 12
    # All rows up to the last step are there, except for unfinished ones.
    logged = [json.loads(line)['step'] for line in (tmp_path / 'metrics.jsonl').open()]
    assert logged == list(range(1, len(logged) + 1))
    assert found['step'] - len(logged) in (0, 1)


def test_a_diverged_run_is_recorded(tmp_path: pathlib.Path) -> None:
    options = {'optimizer__learning_rate': 1e38, 'guard': {'non_finite': 'stop'}}
    with pytest.raises(NonFiniteError):
        trainer_in(tmp_path, **options).fit()
    found = command.result(tmp_path)
    assert (found['status'], found['error']['type']) == ('diverged', 'NonFiniteError')
    assert run_json(tmp_path)['status'] == 'diverged'


@pytest.mark.slow
def test_user_errors_and_interrupts_are_recorded(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError):
        trainer_in(tmp_path, 'refuse').fit()
    found = command.result(tmp_path)
    assert (found['status'], found['error']['type']) == ('failed', 'UserError')
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path, 'interrupt').fit()
    found = command.result(tmp_path)
    # It resumed from step 10, which was saved when the earlier hook failed.
    assert (found['status'], found['step']) == ('interrupted', 20)
    assert run_json(tmp_path)['status'] == 'interrupted'


@pytest.mark.slow
def test_a_failed_start_does_not_change_an_earlier_run(tmp_path: pathlib.Path) -> None:
    trainer_in(tmp_path).fit()
    before = (tmp_path / 'result.json').read_bytes(), (tmp_path / 'run.json').read_bytes()
    with pytest.raises(UserError, match=r'config\.mesh'):
        trainer_in(tmp_path, train_for='80 steps', mesh__data=3).fit()
    for path in (tmp_path / 'checkpoints').rglob('*'):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises((CheckpointError, UserError)):
        trainer_in(tmp_path, train_for='80 steps').fit()
    after = (tmp_path / 'result.json').read_bytes(), (tmp_path / 'run.json').read_bytes()
    assert after == before


def test_a_failed_start_in_an_empty_directory_is_recorded(tmp_path: pathlib.Path) -> None:
    for directory in (tmp_path, tmp_path / 'none'):
        with pytest.raises(UserError, match='is not divisible by'):
            trainer_in(directory, accumulate=7).fit()
    found = command.result(tmp_path)
    assert (found['status'], found['step'], found['error']['type']) == ('failed', 0, 'UserError')
    assert not (tmp_path / 'none').exists()


@pytest.mark.slow
def test_a_paused_run_has_a_status_and_no_result(tmp_path: pathlib.Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.fit(max_steps=10)
    assert (run_json(tmp_path)['status'], run_json(tmp_path)['step']) == ('paused', 10)
    assert not (tmp_path / 'result.json').exists()
    trainer.fit()
    run = run_json(tmp_path)
    assert [(each['from_step'], each['step']) for each in run['starts']] == [(0, 10), (10, 40)]


@pytest.mark.slow
def test_last_words(tmp_path: pathlib.Path) -> None:
    """They are written when a process exits at once; here the run continues and replaces them."""
    SAID.clear()
    trainer_in(tmp_path, 'leave').fit()
    assert [(each['status'], each['step'], each['run']) for each in SAID] == [
        ('failed', step, 'failed') for step in (10, 20, 30, 40)
    ]
    assert SAID[0]['error']['message'] == 'the process ends now'
    last_words.record('failed', 'no run is on any more')
    assert command.result(tmp_path)['status'] == 'finished'


@pytest.mark.slow
def test_the_files_of_a_failing_command(tmp_path: pathlib.Path) -> None:
    hook = f'--config.hooks={{"hook": {{"ref": "{__name__}:fail"}}}}'
    args = ('--config.train_for=40steps', '--config.log.every=10steps')
    warned = '--config.checkpoint.best={"metric": "eval/test/loss", "mode": "min"}'
    never = ('--config.evals.test.every=7steps', '--config.checkpoint.every=10steps')
    done = command.run(
        command.MLP, *command.SMALL, *args, *never, hook, warned, f'--workdir={tmp_path}'
    )
    assert done.code == 1
    assert command.result(tmp_path)['status'] == 'failed'
    log, debug = (tmp_path / 'log.txt').read_text(), (tmp_path / 'debug.log').read_text()
    shown = [line for line in done.out.splitlines() if line]
    assert len(shown) > 10
    assert [line for line in shown if line not in log] == []
    # Each line has its time.
    stamped = [line[20:] for line in log.splitlines() if line.startswith('20')]
    assert [line for line in shown if line not in stamped] == []
    assert [line for line in stamped if line.startswith('Warning: config.checkpoint.best: only')]
    for text in (log, debug):
        assert text.rstrip().endswith('ValueError: the hook failed')
        assert 'Traceback (most recent call last)' in text
    for chatter in ('absl', 'orbax'):
        assert chatter in debug
        assert chatter not in log


class Missing(Broken):
    """A source that cannot be opened."""

    def __init__(self) -> None:
        raise OSError('the disk is gone')


@pytest.mark.slow
def test_a_source_that_cannot_be_opened_is_recorded(tmp_path: pathlib.Path) -> None:
    source = f'--config.data.source={json.dumps({"target": f"{__name__}:Missing"})}'
    done = command.run(command.MLP, source, f'--workdir={tmp_path / "new"}')
    assert done.code == 1
    assert (tmp_path / 'new' / 'log.txt').read_text().rstrip().endswith('the disk is gone')
    result = command.result(tmp_path / 'new')
    assert (result['status'], result['step']) == ('failed', 0)
    assert result['error']['message'] == 'the disk is gone'
    # Nothing of an earlier run is lost.
    command.train(tmp_path / 'old', '--config.train_for=5steps')
    before = command.result(tmp_path / 'old')
    assert command.run(command.MLP, source, f'--workdir={tmp_path / "old"}').code == 1
    assert command.result(tmp_path / 'old') == before
    # Nor is the error, where nothing can be written.
    (tmp_path / 'file').touch()
    done = command.run(command.MLP, source, f'--workdir={tmp_path / "file"}')
    assert done.code == 1 and 'the disk is gone' in done.err
    # And a new one starts where there was none.
    command.train(tmp_path / 'new', '--config.train_for=5steps')
    assert command.result(tmp_path / 'new')['status'] == 'finished'
