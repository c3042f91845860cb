# SPDX-License-Identifier: Apache-2.0
"""Rows on disk: valid JSON, truncated on resume; a full disk for TensorBoard does not end a run."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from tests import command
from trainer.observe.writers import MetricsFile, TensorBoard, Writers, truncate_after


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f'{constant} is not JSON')

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events(directory: pathlib.Path) -> list[event_pb2.Event]:
    """Returns the events of all files, in the order in which TensorBoard reads them."""
    found = []
    for path in sorted(directory.glob('events.out.tfevents.*')):
        data = path.read_bytes()
        while data:
            # Length, its checksum, the event, its checksum.
            size = int.from_bytes(data[:8], 'little')
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'metrics.jsonl'
    file = MetricsFile(path)
    file.write(10, {'train/loss': 0.1, 'train/examples': 320})
    assert read(path) == [{'step': 10, 'train/loss': 0.1, 'train/examples': 320}]
    file.sync()
    file.close()


def test_values_that_are_not_finite_are_null(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'metrics.jsonl'
    MetricsFile(path).write(1, {'nan': math.nan, 'inf': math.inf, 'minus': -math.inf, 'one': 1.0})
    assert read(path) == [{'step': 1, 'nan': None, 'inf': None, 'minus': None, 'one': 1.0}]


@pytest.mark.parametrize('torn', ['{"step": 20, "tra', '{"step": 5, "train/loss": 1.0}', '\0\0\0'])
def test_resume_removes_later_rows_and_an_incomplete_line(
    tmp_path: pathlib.Path, torn: str
) -> None:
    path = tmp_path / 'metrics.jsonl'
    file = MetricsFile(path)
    for step in (10, 20, 30):
        file.write(step, {'train/loss': 1.0})
    file.close()
    with path.open('a') as end:
        end.write(torn)
    file = MetricsFile(path, resume_step=20)
    file.write(30, {'train/loss': 2.0})
    assert [(row['step'], row['train/loss']) for row in read(path)] == [(10, 1), (20, 1), (30, 2)]
    assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


def test_a_blank_line_is_not_damage(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n\n  \n{"step": 2}\n')
    truncate_after(epath.Path(path), 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert not caplog.records
    assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


def test_a_file_without_later_rows_is_not_rewritten(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 3}\n')
    inode = path.stat().st_ino
    truncate_after(epath.Path(path), 3)
    assert path.stat().st_ino == inode
    truncate_after(epath.Path(path), 2)
    assert path.read_text() == ''


def test_resume_repeats_no_row_at_its_step(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'metrics.jsonl'
    file = MetricsFile(path)
    file.write(20, {'train/loss': 1.0})
    file.write(20, {'eval/test/loss': 2.0})
    file.close()
    file = MetricsFile(path, resume_step=20)
    file.write(20, {'eval/test/loss': 2.0})
    file.write(20, {'eval/other/loss': 3.0})
    file.write(21, {'eval/test/loss': 4.0})
    kinds = [(row['step'], *sorted(row.keys() - {'step'})) for row in read(path)]
    assert kinds == [
        (20, 'train/loss'),
        (20, 'eval/test/loss'),
        (20, 'eval/other/loss'),
        (21, 'eval/test/loss'),
    ]


@pytest.mark.slow
def test_a_run_killed_before_its_result_repeats_no_row(tmp_path: pathlib.Path) -> None:
    for _ in range(2):
        command.train(tmp_path, '--config.train_for=20steps', '--config.log.every=10steps')
        steps = [(row['step'], 'train/loss' in row) for row in command.rows(tmp_path)]
        assert steps == [(10, True), (20, True), (20, False)]
        # As if it had been killed between its last save and the result.
        (tmp_path / 'result.json').unlink()


def test_tensorboard_has_the_rows(tmp_path: pathlib.Path) -> None:
    writer = TensorBoard(tmp_path)
    writer.write(10, {'train/loss': 0.5, 'train/accuracy': 0.25})
    writer.sync()
    rows = [
        (e.step, {v.tag: v.simple_value for v in e.summary.value})
        for e in events(tmp_path)
        if e.HasField('summary')
    ]
    assert rows == [(10, {'train/loss': 0.5, 'train/accuracy': 0.25})]
    writer.close()


def test_tensorboard_hides_events_after_the_resumed_step(tmp_path: pathlib.Path) -> None:
    # Three starts within one second: none may overwrite the file of another.
    for resume_step in (0, 7, 7):
        writer = TensorBoard(tmp_path, resume_step=resume_step)
        writer.write(resume_step + 1, {'train/loss': 1.0})
        writer.close()
    assert len(list(tmp_path.iterdir())) == 3
    starts = [e.step for e in events(tmp_path) if e.HasField('session_log')]
    # TensorBoard drops earlier events from the step of a START on.
    assert sorted(starts) == [1, 8, 8]


FULL_DISK = """
import logging, pathlib, resource, signal, sys
from trainer.observe.writers import MetricsFile, TensorBoard, Writers

logging.basicConfig(format='WARNED %(message)s')
directory = pathlib.Path(sys.argv[1])
(directory / 'events').mkdir()
writers = Writers(
    [MetricsFile(directory / 'metrics.jsonl')], [lambda: TensorBoard(directory / 'events')]
)
# No file may grow beyond this: a disk that is full for the larger event file.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
for step in range(300):
    writers.write(step, {'train/' + 'x' * 100: 1.0} if step < 30 else {'a': 1.0})
    writers.sync()
writers.close()
"""


def test_a_full_disk_for_tensorboard_does_not_end_the_run(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, '-c', FULL_DISK, str(tmp_path)],
        cwd=command.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('WARNED') == 1
    assert 'writing TensorBoard events failed ([Errno 27]' in done.stderr
    assert [row['step'] for row in read(tmp_path / 'metrics.jsonl')] == list(range(300))


FULL_FOR_A_WHILE = """
import json, logging, pathlib, resource, signal, sys
from trainer.observe import retry
from trainer.observe.writers import MetricsFile, TensorBoard, Writers

logging.basicConfig(format='WARNED %(message)s')
retry._FIRST_SECS = 0.0  # Tries again at each row.
directory = pathlib.Path(sys.argv[1])
(directory / 'events').mkdir()
writers = Writers(
    [MetricsFile(directory / 'metrics.jsonl')], [lambda: TensorBoard(directory / 'events')]
)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for step in range(100):
    if step in (10, 20):  # In the middle of a row.
        soft = 505 if step == 10 else 100_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, 100_000))
    writers.write(step, {'train/loss': 1.0 / 3})
    if step % 10 == 9:
        writers.sync()
    if step == 15:
        lines = (directory / 'metrics.jsonl').read_text().splitlines()
        print(json.dumps([json.loads(line)['step'] for line in lines[:-1]]))
if sys.argv[2] == 'to the end':
    resource.setrlimit(resource.RLIMIT_FSIZE, (505, 100_000))
    writers.write(100, {'train/loss': 1.0 / 3})
writers.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize('end', ['', 'to the end'])
def test_rows_that_cannot_be_written_are_written_later(tmp_path: pathlib.Path, end: str) -> None:
    done = subprocess.run(
        [sys.executable, '-c', FULL_FOR_A_WHILE, str(tmp_path), end],
        cwd=command.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert 10 <= len(json.loads(done.stdout)) < 16
    assert [row['step'] for row in read(tmp_path / 'metrics.jsonl')] == list(range(100))
    path = tmp_path / 'metrics.jsonl'
    assert done.stderr.count(f'{path} cannot be written (File too large). Training') == 1 + bool(
        end
    )
    assert f'{path} can be written again, and has all rows.' in done.stderr
    assert (f'{path} lacks the last 1 rows of this run' in done.stderr) == bool(end)
    # TensorBoard's events of the meantime are lost, but not those before and after.
    steps = {e.step for e in events(tmp_path / 'events') if e.HasField('summary')}
    assert {5, 50, 99} <= steps
    assert done.stderr.count('WARNED') <= 6


def test_tensorboard_that_cannot_start_does_not_end_the_run(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    writers = Writers((), [lambda: TensorBoard(tmp_path / 'missing')])
    writers.write(1, {'train/loss': 1.0})
    writers.close()
    assert len(caplog.records) == 1
    assert 'missing' in caplog.text and 'training and metrics.jsonl continue' in caplog.text


def test_an_error_of_a_required_writer_ends_the_run(tmp_path: pathlib.Path) -> None:
    file = MetricsFile(tmp_path / 'metrics.jsonl')
    writers = Writers([file])
    file.close()
    with pytest.raises(ValueError, match='closed file'):
        writers.write(1, {'train/loss': 1.0})
