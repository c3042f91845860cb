# SPDX-License-Identifier: Apache-2.0
"""A run whose newest checkpoints are damaged, or of other versions, resumes."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tests.small import one_device, trainer_in
from trainer.checkpoint.errors import CheckpointError
from trainer.config.errors import UserError
from trainer.trainer import Trainer

# TensorStore warns of the files that it cannot read.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

SAVES: dict[str, Any] = {'checkpoint__every': '10 steps', 'checkpoint__keep_last': 3}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def run(workdir: pathlib.Path, **overrides: Any) -> Trainer:
    return trainer_in(workdir, mesh=one_device(), **{**SAVES, **overrides})


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run, with the checkpoints of steps 30, 40 and 50."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    run(workdir).fit()
    return workdir


@pytest.fixture
def copy(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The same run, without the result: as it would be, had it been killed at its last save."""
    shutil.copytree(whole, tmp_path / 'run')
    (tmp_path / 'run' / 'result.json').unlink()
    return tmp_path / 'run'


def truncate_arrays(step: pathlib.Path) -> None:
    largest = max(step.glob('state/**/d/*'), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def flip_a_bit(step: pathlib.Path) -> None:
    largest = max(step.glob('state/**/d/*'), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))


def replace_metadata(step: pathlib.Path) -> None:
    (step / 'meta' / 'metadata').write_text('[1, 2]')


def damage_health(step: pathlib.Path) -> None:
    file = step / 'meta' / 'metadata'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'health': [1, 2]}))


def replace_by_older(step: pathlib.Path) -> None:
    shutil.rmtree(step)
    shutil.copytree(step.with_name('30'), step)


def digests(workdir: pathlib.Path) -> tuple[str, str]:
    result = json.loads((workdir / 'result.json').read_text())
    return result['digest'], result['data_digest']


def rows(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.parametrize(
    ('damage', 'reason'),
    [
        (truncate_arrays, '50 is damaged: '),
        slow(flip_a_bit, '50 is damaged: '),
        slow(replace_metadata, '50 is damaged: its metadata is a list, not an object'),
        slow(damage_health, "the checkpoint of step 50 is damaged: 'health' in its metadata"),
        slow(replace_by_older, '50 is not the checkpoint of step 50: its metadata says 30'),
    ],
)
def test_the_next_older_checkpoint_is_restored(
    damage: Callable[[pathlib.Path], None],
    reason: str,
    whole: pathlib.Path,
    copy: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(copy / 'checkpoints' / '50')
    run(copy).fit()
    out = capsys.readouterr().out
    [warning] = [line for line in out.splitlines() if line.startswith('Warning: ')]
    assert reason in warning
    assert warning.endswith('. Moved to 50.damaged.')
    assert digests(copy) == digests(whole)
    assert sorted(path.name for path in (copy / 'checkpoints').iterdir()) == [
        *('30', '40', '50'),
        '50.damaged',
    ]
    train = [row for row in rows(copy) if 'train/loss' in row]
    assert [row['step'] for row in train] == [10, 20, 30, 40, 50]
    assert train[-1]['resume/fallback_steps'] == 10
    assert 'resume/fallback_steps' not in train[-2]


@pytest.mark.slow
def test_several_damaged_checkpoints(
    whole: pathlib.Path, copy: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in ('40', '50'):
        truncate_arrays(copy / 'checkpoints' / step)
    run(copy, log__every='5 steps').fit()
    assert capsys.readouterr().out.count('Warning: ') == 2
    assert digests(copy) == digests(whole)
    counts = {r['step']: r.get('resume/fallback_steps') for r in rows(copy) if 'train/loss' in r}
    assert counts == {10: None, 20: None, 30: None, 35: 20, 40: None, 45: None, 50: None}
    assert json.loads((copy / 'result.json').read_text())['metrics']['resume/fallback_steps'] == 20


@pytest.mark.slow
def test_damaged_again(copy: pathlib.Path) -> None:
    for name in ('50.damaged', '50.damaged-2'):
        truncate_arrays(copy / 'checkpoints' / '50')
        (copy / 'result.json').unlink(missing_ok=True)
        run(copy).fit()
        assert (copy / 'checkpoints' / name).is_dir()
        assert rows(copy)[-1]['step'] == 50
        [row] = [row for row in rows(copy) if row['step'] == 50 and 'train/loss' in row]
        assert row['resume/fallback_steps'] == 10


def test_without_a_sound_one_nothing_changes(copy: pathlib.Path) -> None:
    for step in ('30', '40', '50'):
        truncate_arrays(copy / 'checkpoints' / step)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob('*') if path.is_file()}
    with pytest.raises(CheckpointError, match='no checkpoint of this run can be restored') as error:
        run(copy).fit()
    for step in ('30', '40', '50'):
        assert f'{copy}/checkpoints/{step} is damaged: ' in str(error.value)
    assert error.value.exit_code == 65
    after = {path: path.stat().st_mtime_ns for path in copy.rglob('*') if path.is_file()}
    assert after.keys() == before.keys()
    assert {path.name for path in before if after[path] != before[path]} <= {'.lock'}


def test_another_shape_is_no_damage(copy: pathlib.Path) -> None:
    """An older checkpoint would have that shape, too."""
    trainer = trainer_in(copy, mesh=one_device(), allow=True, model__features=(8,), **SAVES)
    with pytest.raises(UserError, match='does not fit the state of this config'):
        trainer.fit()
    assert not (copy / 'checkpoints' / '50.damaged').exists()


def test_files_that_may_not_be_read_are_no_damage(
    copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('trainer.checkpoint.reading.read_state', refuse)
    with pytest.raises(CheckpointError, match='50 cannot be read: PermissionError'):
        run(copy).fit()
    assert not (copy / 'checkpoints' / '50.damaged').exists()


@pytest.mark.slow
def test_a_copy_after_the_end_of_the_run_is_no_longer_run(copy: pathlib.Path) -> None:
    shutil.copytree(copy / 'checkpoints' / '50', copy / 'checkpoints' / '900')
    result = run(copy).fit()
    assert result.step == 50
    assert (copy / 'checkpoints' / '900.damaged').is_dir()


@pytest.mark.slow
def test_other_versions_are_named(copy: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / 'checkpoints' / '50' / 'meta' / 'metadata'
    meta = json.loads(file.read_text())
    now = meta['versions']['jax']
    meta['versions'] |= {'jax': '0.1.75', 'torch': '2.0'}
    file.write_text(json.dumps(meta))
    run(copy).fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if 'other versions' in line]
    assert lines == [
        f'The checkpoint was saved with other versions: jax 0.1.75 -> {now}. The run may continue '
        'with other roundings.'
    ]
