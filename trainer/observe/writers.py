# SPDX-License-Identifier: Apache-2.0
"""Writers of metric rows: `metrics.jsonl`, and TensorBoard event files without TensorFlow."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Protocol, cast

from etils import epath

from trainer import compat
from trainer.config import files, json_text
from trainer.config.errors import UserError
from trainer.observe.retry import Retry
from trainer.observe.summaries import Histogram, Images, Summary, Texts

_log = logging.getLogger('trainer')
_FLUSH_SECS = 30.0
# Errors of a path that is a directory or a dangling link.
_NO_FILE = (errno.EISDIR, errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Writer(Protocol):
    """A destination of metric rows."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds the values of a step."""

    def write_summaries(self, step: int, summaries: Mapping[str, Summary]) -> None:
        """Adds the texts, images and histograms of a step."""

    def sync(self) -> None:
        """Returns when all rows are on disk."""

    def close(self) -> None:
        """Closes the destination."""


class MetricsFile:
    """One JSON object per line: `step` and flat names. A value that is not finite becomes null.

    If the file cannot be written, for example because the disk is full, the run does not end: its
    rows are kept in memory, and written as soon as it can be.
    """

    def __init__(self, path: epath.PathLike, *, resume_step: int = 0):
        """Opens the file to append.

        Args:
            path: the file `metrics.jsonl`.
            resume_step: rows after this step and an incomplete last line are removed first;
                damaged lines move to a separate file.

        Raises:
            UserError: if the path exists but is not a file.
        """
        self._path = epath.Path(path)
        self._resume_step = resume_step
        try:
            # The steps after the checkpoint are run again, and would be in the file twice.
            truncate_after(self._path, resume_step)
            self._resumed_names = _read_names(self._path, resume_step)
            self._file = self._open()
            self._size = self._path.stat().length
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            raise UserError(
                f'{path} cannot be opened: {error.strerror}. The run writes its metrics there: '
                'expected a file or nothing. Move or delete it.'
            ) from error
        self._lines: list[bytes] = []
        self._retry = Retry()

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Appends one line, without what the resumed run had already written at this step."""
        # Evaluations at the step of a checkpoint may run again after it is restored.
        if step == self._resume_step:
            row = {name: x for name, x in row.items() if name not in self._resumed_names}
        if not row:
            return
        values = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._lines.append(json.dumps({'step': step, **values}).encode() + b'\n')
        # To the operating system only: a killed process loses nothing, and `sync` waits for the
        # disk before a save.
        if self._retry.is_due():
            self._try(self._write_lines)

    def write_summaries(self, step: int, summaries: Mapping[str, Summary]) -> None:
        """Does nothing: a line has only numbers."""

    def sync(self) -> None:
        """Returns when all rows are on disk, or cannot be written now."""
        self._try(self._write_lines, then=lambda: files.fsync(self._file))

    def close(self) -> None:
        """Closes the file. Rows that cannot be written even now are lost, with a warning."""
        self._try(self._write_lines)
        if self._lines:
            _log.warning('%s lacks the last %d rows of this run', self._path, len(self._lines))
        self._file.close()

    def _open(self) -> IO[bytes]:
        if '://' in str(self._path):
            return cast(IO[bytes], self._path.open('ab'))
        # Without a buffer, which would keep what could not be written, and write it again.
        return open(self._path, 'ab', buffering=0)

    def _write_lines(self) -> None:
        data = b''.join(self._lines)
        rest = memoryview(data)
        while rest:  # A part may fit on a disk that is nearly full.
            rest = rest[self._file.write(rest) :]
        self._size += len(data)
        self._lines.clear()

    def _try(self, write: Callable[[], None], then: Callable[[], None] = lambda: None) -> None:
        try:
            if self._retry.failed:
                # Part of a row may have been written.
                self._file.close()
                if self._path.exists() and self._path.stat().length > self._size:
                    os.truncate(self._path, self._size)
                self._file = self._open()
            write()
            then()
        except OSError as error:
            if self._retry.count_failure():
                _log.warning(
                    '%s cannot be written (%s). Training continues, and its rows are kept in '
                    'memory until they can be written.',
                    self._path,
                    error.strerror,
                )
            return
        if self._retry.count_success():
            _log.warning('%s can be written again, and has all rows.', self._path)


class TensorBoard:
    """Event files for TensorBoard, one event for each row.

    They are written in the caller's thread. If the thread of tensorboardX's `EventFileWriter` dies
    because the disk is full, its queue fills up and the next row waits forever.
    """

    def __init__(self, directory: epath.PathLike, *, resume_step: int = 0):
        """Opens a new event file; TensorBoard ignores events after `resume_step` in older ones."""
        # Imported here because the import takes time, which a run without it need not spend.
        events_writer, event, summary = compat.tensorboard_events()
        self._event = event.Event
        self._summary, self._proto = summary.Summary, summary.HistogramProto
        # The name has a time in whole seconds; a restart within one must not overwrite the file.
        suffix = f'.{os.getpid()}.{time.monotonic_ns()}'
        self._writer = events_writer(os.path.join(os.fspath(directory), 'events'), suffix)
        self._flushed = time.monotonic()
        start = event.SessionLog(status=event.SessionLog.START)
        # TensorBoard discards what older files have from this step on.
        self._add(resume_step + 1, session_log=start)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds one event with all values."""
        # SummaryWriter.add_scalar would write one event per value, ten times the work.
        values = [self._summary.Value(tag=name, simple_value=v) for name, v in row.items()]
        self._add(step, summary=self._summary(value=values))
        if time.monotonic() - self._flushed > _FLUSH_SECS:
            self.sync()

    def write_summaries(self, step: int, summaries: Mapping[str, Summary]) -> None:
        """Adds one event with all texts, images and histograms."""
        values = []
        for name, each in summaries.items():
            if isinstance(each, Images):
                height, width, channels = each.grid().shape
                image = self._summary.Image(
                    height=height,
                    width=width,
                    colorspace=channels,
                    encoded_image_string=each.png(),
                )
                values.append(self._summary.Value(tag=name, image=image))
            elif isinstance(each, Texts):
                values.append(compat.tensorboard_text(name, '\n\n---\n\n'.join(each.texts)))
            elif isinstance(each, Histogram):
                values.append(self._summary.Value(tag=name, histo=self._histogram(each)))
        self._add(step, summary=self._summary(value=values))

    def _histogram(self, each: Histogram) -> Any:
        bins = len(each.counts)
        number = float(each.counts.sum())
        if not number:
            return self._proto()
        width = (each.high - each.low) / bins
        return self._proto(
            min=each.low,
            max=each.high,
            num=number,
            sum=each.mean * number,
            sum_squares=(each.mean**2 + each.std**2) * number,
            # The upper limit of each bin.
            bucket_limit=[each.low + (i + 1) * width for i in range(bins)],
            bucket=[float(count) for count in each.counts],
        )

    def sync(self) -> None:
        """Returns when all events are on disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))


class _Optional:
    """A writer whose errors lose only its own rows; a new one is made after a while."""

    def __init__(self, make: Callable[[], Writer]):
        self._make = make
        self._writer: Writer | None = None
        self._retry = Retry()
        self.apply(lambda writer: None)

    def apply(self, act: Callable[[Writer], None]) -> None:
        if not self._retry.is_due():
            return
        try:
            if self._writer is None:
                self._writer = self._make()
            act(self._writer)
        except Exception as error:
            self._writer = None
            if self._retry.count_failure():
                _log.warning(
                    'writing TensorBoard events failed (%s); training and metrics.jsonl continue, '
                    'and the events when they can be written again',
                    error,
                )
        else:
            self._retry.count_success()


class Writers:
    """Several writers, of which some are optional."""

    def __init__(self, required: Sequence[Writer], optional: Sequence[Callable[[], Writer]] = ()):
        """Creates the optional writers.

        Args:
            required: writers whose errors end the run.
            optional: functions that create writers whose errors lose only their own rows.
        """
        self._required = list(required)
        self._optional = [_Optional(make) for make in optional]

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds the values of a step to all writers."""
        self._for_each(lambda writer: writer.write(step, row))

    def write_summaries(self, step: int, summaries: Mapping[str, Summary]) -> None:
        """Adds the summaries of a step to the writers that support them."""
        self._for_each(lambda writer: writer.write_summaries(step, summaries))

    def sync(self) -> None:
        """Returns when all rows are on disk."""
        self._for_each(lambda writer: writer.sync())

    def close(self) -> None:
        """Closes all writers."""
        self._for_each(lambda writer: writer.close())

    def _for_each(self, act: Callable[[Writer], None]) -> None:
        for writer in self._required:
            act(writer)
        for optional in self._optional:
            optional.apply(act)


def truncate_after(path: epath.Path, step: int) -> None:
    """Removes the rows after a step and an incomplete last line, atomically.

    Lines that are not rows, as after a disk error, move to a separate file, with a warning.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    *lines, _ = data.split(b'\n')  # The last one is empty or incomplete.
    remaining, damaged = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():  # A blank line is not damage: an editor may have left it.
            continue
        line_step = _parse_step(line)
        if line_step is None:
            damaged.append((number, line))
        elif line_step <= step:
            remaining.append(line)
    if damaged:
        _move_damaged(path, damaged)
    text = b''.join(line + b'\n' for line in remaining)
    if text != data:
        # Synced before the rename: after a crash there is either the old file or the whole new one.
        files.replace(path, text, sync=True)


def _move_damaged(path: epath.Path, damaged: Sequence[tuple[int, bytes]]) -> None:
    """Appends damaged lines to their own file, and warns with their line numbers."""
    damaged_path = path.parent / f'{path.name}.damaged'
    with damaged_path.open('ab') as file:
        file.write(b''.join(line + b'\n' for _, line in damaged))
        files.fsync(file)
    numbers = ', '.join(str(number) for number, _ in damaged[:5])
    which = f'line {numbers}' if len(damaged) == 1 else f'{len(damaged):,} lines ({numbers}'
    if len(damaged) > 1:
        which += ', ...)' if len(damaged) > 5 else ')'
    _log.warning('%s is damaged: moved %s to %s', path, which, damaged_path)


def _parse_step(line: bytes) -> int | None:
    """Returns the step of a row; None if the line is not a row."""
    try:
        row = json_text.parse(line)
    except ValueError:
        return None
    step = row.get('step') if isinstance(row, dict) else None
    return step if json_text.is_int(step) else None


def _read_names(path: epath.Path, step: int) -> set[str]:
    """Returns the names of the values in the last rows that are of this step."""
    names: set[str] = set()
    # Not `splitlines`: a carriage return within a row is JSON white space.
    lines = path.read_bytes().split(b'\n')[:-1] if path.exists() else []
    # From the end: rows are in the order of their steps, so the first other step ends the search.
    for row in map(json_text.parse, reversed(lines)):
        if row['step'] != step:
            break
        names.update(row)
    return names - {'step'}
