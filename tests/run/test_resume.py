# SPDX-License-Identifier: Apache-2.0
"""What a run saves for the next start, and starts that fail."""

from __future__ import annotations

import json
import pathlib
import shutil
import threading
from typing import Any

import numpy as np
import pytest

from tests import small
from tests.command import wait_for
from trainer.checkpoint.errors import SaveError
from trainer.checkpoint.manager import CheckpointError
from trainer.config.errors import UserError
from trainer.hooks import Event
from trainer.run.workdir import Workdir
from trainer.trainer import Trainer

FAIL_AT: list[int] = []
KNOWN_AT_START: list[dict[str, float]] = []


def fail(event: Event) -> None:
    if event.kind == 'start':
        KNOWN_AT_START.append(dict(event.metrics))
    if event.kind == 'log' and event.step in FAIL_AT:
        FAIL_AT.remove(event.step)
        raise RuntimeError('the hook failed')


def trainer_in(workdir: pathlib.Path | None, **overrides: Any) -> Trainer:
    options = {'hooks': {'fail': {'ref': f'{__name__}:fail'}}}
    return small.trainer_in(workdir, **{**options, **overrides})


def files(workdir: pathlib.Path) -> dict[str, bytes]:
    """Returns the files of a run, without its checkpoints."""
    return {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()}


@pytest.mark.slow
def test_fit_after_a_failure_starts_cleanly(tmp_path: pathlib.Path) -> None:
    trainer = trainer_in(tmp_path / 'twice')
    FAIL_AT.append(30)
    with pytest.raises(RuntimeError, match='the hook failed'):
        trainer.fit()
    # As if another run had saved the step before, which knows nothing of the one that is gone.
    assert trainer.checkpoints is not None
    shutil.rmtree(trainer.checkpoints.directory / '30')
    for name in ('.saved', 'result.json'):
        (tmp_path / 'twice' / name).unlink()
    again = trainer.fit()
    assert KNOWN_AT_START[-1] == {}
    whole = trainer_in(tmp_path / 'once').fit()
    assert again.step == whole.step == 50
    one, two = (
        json.loads((tmp_path / name / 'result.json').read_text()) for name in ('once', 'twice')
    )
    assert one['digest'] == two['digest']
    assert one['data_digest'] == two['data_digest']
    steps = [
        [json.loads(line)['step'] for line in (tmp_path / name / 'metrics.jsonl').open()]
        for name in ('once', 'twice')
    ]
    assert steps[0] == steps[1]


def test_successive_calls_continue_the_counts(tmp_path: pathlib.Path) -> None:
    results = {}
    for name, calls in (('one', [None]), ('three', [13, 20, None])):
        trainer = trainer_in(tmp_path / name)
        for max_steps in calls:
            trainer.fit(max_steps=max_steps)
        results[name] = json.loads((tmp_path / name / 'result.json').read_text())
    assert results['one']['data_digest'] == results['three']['data_digest']
    assert results['one']['digest'] == results['three']['digest']


@pytest.mark.slow
def test_the_reported_time_is_of_the_last_call() -> None:
    trainer = trainer_in(None)
    trainer.fit(max_steps=25)
    assert trainer.report.time.get('eval') > 0
    trainer.fit(max_steps=10)
    assert trainer.report.time.get('eval') == 0
    assert trainer.report.time.get('steps') > 0


@pytest.mark.slow
def test_a_failed_restore_does_not_change_the_directory(tmp_path: pathlib.Path) -> None:
    trainer_in(tmp_path, train_for='20 steps').fit()
    for path in (tmp_path / 'checkpoints' / '20' / 'state').rglob('*'):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(path.read_bytes()[:5000])
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match='damaged'):
        trainer_in(tmp_path, log__every='5 steps').fit()
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_longer_run_is_refused(tmp_path: pathlib.Path) -> None:
    trainer_in(tmp_path).fit()
    before = files(tmp_path)
    with pytest.raises(UserError, match=r'is at step 50, but config\.train_for is only 30 steps'):
        trainer_in(tmp_path, train_for='30 steps').fit()
    with pytest.raises(UserError, match='is at step 50'):
        trainer_in(tmp_path, train_for='30 steps').check_workdir()
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_finished_run_does_not_evaluate_again(tmp_path: pathlib.Path) -> None:
    first = trainer_in(tmp_path).fit()
    again = trainer_in(tmp_path).fit()
    assert again.status == 'finished'
    assert again.metrics == first.metrics
    assert again.state.step == 50


@pytest.mark.slow
def test_the_final_evaluation_belongs_to_the_last_checkpoint(tmp_path: pathlib.Path) -> None:
    """Also where a periodic save is due at the last step."""
    trainer = trainer_in(tmp_path, evals__test__every='never', checkpoint__every='25 steps')
    trainer.fit()
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.meta(25)['evaluated'] == []
    last = trainer.checkpoints.meta(50)
    assert last['evaluated'] == ['test']
    assert 'eval/test/loss' in last['metrics']


@pytest.mark.slow
def test_a_state_whose_step_differs_from_its_name_is_refused(tmp_path: pathlib.Path) -> None:
    """Editing the metadata does not help."""
    checkpoints = tmp_path / 'checkpoints'
    trainer_in(tmp_path, evals={}).fit(max_steps=20)
    (checkpoints / '20').rename(checkpoints / '30')
    meta = checkpoints / '30' / 'meta' / 'metadata'
    meta.write_text(json.dumps({**json.loads(meta.read_text()), 'step': 30}))
    with pytest.raises(CheckpointError, match='metadata says 30 and its state says 20'):
        trainer_in(tmp_path, evals={}).fit()


DELETE_AT: list[int] = []


def delete(event: Event) -> None:
    if event.kind == 'log' and event.step in DELETE_AT:
        DELETE_AT.remove(event.step)
        assert event.workdir is not None
        # Between two saves: one that is under way fails by itself.
        wait_for(lambda: not any(t.name.startswith('checkpoint') for t in threading.enumerate()))
        shutil.rmtree(event.workdir)


@pytest.mark.slow
@pytest.mark.parametrize(('every', 'noticed'), [('20 steps', 40), ('never', 50)])
def test_a_deleted_directory_ends_the_run_with_an_error(
    tmp_path: pathlib.Path, every: str, noticed: int
) -> None:
    workdir = tmp_path / 'run'
    DELETE_AT[:] = [30]
    hooks = {'delete': {'ref': f'{__name__}:delete'}}
    options = {'evals': {}, 'log__tensorboard': False, 'hooks': hooks}
    trainer = trainer_in(workdir, **options, checkpoint__every=every)
    pattern = f'{workdir} was deleted during this run.* at step {noticed};'
    with pytest.raises(SaveError, match=pattern):
        trainer.fit()
    assert not workdir.exists()
    assert trainer_in(workdir, **options).fit().status == 'finished'


@pytest.mark.slow
def test_another_start_in_the_same_directory_is_detected(tmp_path: pathlib.Path) -> None:
    trainer = trainer_in(tmp_path, evals={}, hooks={'spoil': {'ref': f'{__name__}:restart'}})
    with pytest.raises(SaveError, match=r'another run has overwritten its run\.json'):
        trainer.fit()
    assert not (tmp_path / 'result.json').exists()


def restart(event: Event) -> None:
    """Starts a second run, as is possible on a file system without locks."""
    if event.kind == 'save':
        Workdir(event.workdir or '').begin({}, {}, {})


@pytest.mark.slow
def test_missing_checkpoints_do_not_lose_the_metrics(tmp_path: pathlib.Path) -> None:
    trainer_in(tmp_path, evals={}).fit()
    trainer_in(tmp_path, evals={}, train_for='60 steps').fit()
    shutil.rmtree(tmp_path / 'checkpoints')
    before = files(tmp_path)
    with pytest.raises(UserError, match='the metrics of a run that saved checkpoints, but'):
        trainer_in(tmp_path, evals={}).fit()
    assert files(tmp_path) == before
    # As it says: without them it starts from the beginning, and may be killed at once again.
    (tmp_path / 'metrics.jsonl').unlink()
    FAIL_AT.append(30)
    with pytest.raises(RuntimeError, match='the hook failed'):
        trainer_in(tmp_path, evals={}).fit()
    assert (tmp_path / 'metrics.jsonl').read_text()
    assert trainer_in(tmp_path, evals={}).fit().step == 50


@pytest.mark.slow
def test_the_first_committed_save_is_marked(tmp_path: pathlib.Path) -> None:
    """A process that is killed later leaves the marker, one killed earlier does not."""
    noted = []

    def load_images(event: Event) -> None:
        if event.kind == 'log':
            wait_for(lambda: event.step < 30 or (tmp_path / '.saved').exists())
            noted.append((event.step, (tmp_path / '.saved').exists()))

    trainer = trainer_in(tmp_path, evals={}, checkpoint__every='20 steps')
    object.__setattr__(trainer.experiment, 'hooks', {'look': load_images})
    trainer.fit()
    assert noted[0] == (10, False)
    assert noted[2:] == [(30, True), (40, True), (50, True)]


# ---- data that has changed ---------------------------------------------------------------------

# The content of a data set, which may change between two starts.
DATASET = {'examples': 640, 'brightness': 0}


class Images:
    """A source that reads the current content of a file."""

    def __init__(self) -> None:
        self.spec: dict[str, Any] = {}

    def __len__(self) -> int:
        return DATASET['examples']

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        image = np.full((len(indices), 28, 28, 1), DATASET['brightness'], np.uint8)
        return {'image': image, 'label': (indices % 10).astype(np.int32)}


@pytest.fixture
def dataset(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    for name, value in list(DATASET.items()):
        monkeypatch.setitem(DATASET, name, value)
    return DATASET


def train_and_capture_output(
    workdir: pathlib.Path, capsys: pytest.CaptureFixture[str], steps: int
) -> str:
    """Trains up to a step and returns the output."""
    capsys.readouterr()
    source = {'target': f'{__name__}:Images'}
    result = trainer_in(
        workdir, train_for=f'{steps} steps', data__source=source, data__source__limit=None, evals={}
    ).fit()
    assert result.step == steps
    return capsys.readouterr().out


@pytest.mark.slow
def test_changed_data_gives_one_warning(
    tmp_path: pathlib.Path, dataset: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    train_and_capture_output(tmp_path, capsys, 30)
    assert 'training data' not in train_and_capture_output(tmp_path, capsys, 31)
    dataset['brightness'] = 7
    assert (
        'Warning: the training data has changed: the first example differs in image.\n'
    ) in train_and_capture_output(tmp_path, capsys, 32)
    assert 'training data' not in train_and_capture_output(tmp_path, capsys, 40)
    dataset['examples'] = 800
    assert (
        'Warning: the training data has changed: 640 examples before, 800 examples now. The run '
        'resumes after 1,280 examples (1.6 epochs), in the order of the new data (800 examples): '
        'in the current epoch, some examples are repeated and others skipped.\n'
    ) in train_and_capture_output(tmp_path, capsys, 41)


@pytest.mark.slow
def test_a_checkpoint_without_a_fingerprint_gives_no_warning(
    tmp_path: pathlib.Path, dataset: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    train_and_capture_output(tmp_path, capsys, 10)
    path = tmp_path / 'checkpoints' / '10' / 'meta' / 'metadata'
    meta = json.loads(path.read_text())
    assert meta.pop('data')['examples'] == 640
    path.write_text(json.dumps(meta))
    dataset.update(examples=800, brightness=7)
    assert 'training data' not in train_and_capture_output(tmp_path, capsys, 20)
