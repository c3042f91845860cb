# SPDX-License-Identifier: Apache-2.0
"""Where metric rows go: `metrics.jsonl`, and TensorBoard event files without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Protocol

import numpy as np
from etils import epath

_log = logging.getLogger('trainer')
_FLUSH_SECS = 30.0


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How the finite values of an array are spread.

    Attributes:
        low: the smallest of them.
        high: the largest.
        counts: in bins of equal width between these, (bins,).
        mean: of them.
        std: their standard deviation.
    """

    low: float
    high: float
    counts: np.ndarray
    mean: float
    std: float


class Writer(Protocol):
    """Takes rows."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds the values of a step."""

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Adds the histograms of a step."""

    def sync(self) -> None:
        """Returns when all rows are on disk."""

    def close(self) -> None:
        """Ends the writing."""


class MetricsFile:
    """One JSON object per line: `step` and flat names. A value that is not finite becomes null."""

    def __init__(self, path: epath.PathLike, *, resume_step: int = 0):
        """Opens the file to append.

        Args:
            path: the file.
            resume_step: rows beyond this step, and a torn last line, are cut first.
        """
        self._path = epath.Path(path)
        cut_after(self._path, resume_step)
        self._resume_step = resume_step
        self._resumed_names = _names_at(self._path, resume_step)
        self._file = self._path.open('a')

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Appends one line, unless the run that goes on had written it before it was cut short."""
        if step == self._resume_step and not self._resumed_names.isdisjoint(row):
            return
        values = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps({'step': step, **values}) + '\n')
        self._file.flush()

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Writes none: a line holds numbers."""

    def sync(self) -> None:
        """Returns when all rows are on disk."""
        self._file.flush()
        _fsync(self._file)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard, one event for each row.

    Written in the caller's thread: when the thread of tensorboardX's `EventFileWriter` dies of a
    full disk, the queue in front of it fills up and the next row would wait forever.
    """

    def __init__(self, directory: epath.PathLike, *, resume_step: int = 0):
        """Opens a new event file; TensorBoard hides what older ones hold beyond `resume_step`."""
        # Imported here because it takes time that a run without it need not spend.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event = event_pb2.Event
        self._summary, self._proto = summary_pb2.Summary, summary_pb2.HistogramProto
        # The name has whole seconds; a restart within one must not overwrite the file before it.
        suffix = f'.{os.getpid()}.{time.monotonic_ns()}'
        self._writer = EventsWriter(os.path.join(os.fspath(directory), 'events'), suffix)
        self._flushed = time.monotonic()
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(resume_step + 1, session_log=start)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds one event with all values."""
        # SummaryWriter.add_scalar makes an event for each value, ten times the work.
        values = [self._summary.Value(tag=name, simple_value=v) for name, v in row.items()]
        self._add(step, summary=self._summary(value=values))
        if time.monotonic() - self._flushed > _FLUSH_SECS:
            self.sync()

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Adds one event with all histograms."""
        values = [
            self._summary.Value(tag=name, histo=self._histogram(each))
            for name, each in histograms.items()
        ]
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


class Writers:
    """Several writers; an optional one that fails is left out, with one warning."""

    def __init__(self, required: Sequence[Writer], optional: Sequence[Callable[[], Writer]] = ()):
        """Bundles the writers.

        Args:
            required: an error of theirs is the run's.
            optional: make the writers whose errors cost only their own rows.
        """
        self._required = list(required)
        self._optional: list[Writer] = []
        for make in optional:
            try:
                self._optional.append(make())
            except Exception as error:
                _warn_stopped(error)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds the values of a step everywhere."""
        self._each(lambda writer: writer.write(step, row))

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Adds the histograms of a step where there is a place for them."""
        self._each(lambda writer: writer.write_histograms(step, histograms))

    def sync(self) -> None:
        """Returns when all rows are on disk."""
        self._each(lambda writer: writer.sync())

    def close(self) -> None:
        """Closes all."""
        self._each(lambda writer: writer.close())

    def _each(self, act: Callable[[Writer], None]) -> None:
        for writer in self._required:
            act(writer)
        for writer in list(self._optional):
            try:
                act(writer)
            except Exception as error:
                self._optional.remove(writer)
                _warn_stopped(error)


def cut_after(path: epath.Path, step: int) -> None:
    """Drops the rows beyond a step and a torn last line, atomically."""
    if not path.exists():
        return
    text = path.read_text()
    kept = ''.join(line for line in text.splitlines(keepends=True) if _is_row_up_to(line, step))
    if kept != text:
        temporary = path.parent / f'.{path.name}.tmp'
        with temporary.open('w') as file:
            file.write(kept)
            file.flush()
            _fsync(file)
        temporary.replace(path)


def _is_row_up_to(line: str, step: int) -> bool:
    try:
        return line.endswith('\n') and json.loads(line)['step'] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _names_at(path: epath.Path, step: int) -> set[str]:
    """Returns the names of the values that the last rows, those of this step, hold."""
    names: set[str] = set()
    lines = path.read_text().splitlines() if path.exists() else []
    for row in map(json.loads, reversed(lines)):
        if row['step'] != step:
            break
        names.update(row)
    return names - {'step'}


def _fsync(file: IO[str]) -> None:
    # An object store has no descriptor: there the rows are safe when the file is closed.
    with contextlib.suppress(io.UnsupportedOperation):
        os.fsync(file.fileno())


def _warn_stopped(error: Exception) -> None:
    _log.warning(
        'TensorBoard events are no longer written (%s); metrics.jsonl goes on, and so does the run',
        error,
    )
