# SPDX-License-Identifier: Apache-2.0
"""Where metric rows go: `metrics.jsonl`, and TensorBoard event files without TensorFlow."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath

_log = logging.getLogger('trainer')


class Writer(Protocol):
    """Takes rows."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds the values of a step."""

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
        self._file = self._path.open('a')

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Appends one line."""
        values = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps({'step': step, **values}) + '\n')
        self._file.flush()

    def sync(self) -> None:
        """Returns when all rows are on disk."""
        self._file.flush()
        if hasattr(self._file, 'fileno'):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard, one event for each row."""

    def __init__(self, directory: epath.PathLike, *, resume_step: int = 0):
        """Opens a new event file; on resume TensorBoard hides what lay beyond `resume_step`."""
        # Imported here because it takes time that a run without it need not spend.
        from tensorboardX.event_file_writer import EventFileWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        self._writer = EventFileWriter(os.fspath(directory))
        if resume_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(resume_step + 1, session_log=start)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds one event with all values."""
        # SummaryWriter.add_scalar makes an event for each value, ten times the work.
        values = [self._summary.Value(tag=name, simple_value=v) for name, v in row.items()]
        self._add(step, summary=self._summary(value=values))

    def sync(self) -> None:
        """Hands the events to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **content))


class Writers:
    """Several writers; one of the optional ones that fails is left out, with one warning."""

    def __init__(self, required: Sequence[Writer], optional: Sequence[Writer] = ()):
        """Bundles the writers.

        Args:
            required: an error of theirs is the run's.
            optional: an error of theirs costs only their rows.
        """
        self._required = list(required)
        self._optional = list(optional)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds the values of a step everywhere."""
        self._each('write', step, row)

    def sync(self) -> None:
        """Returns when all rows are on disk."""
        self._each('sync')

    def close(self) -> None:
        """Closes all."""
        self._each('close')

    def _each(self, method: str, *args: Any) -> None:
        for writer in self._required:
            getattr(writer, method)(*args)
        for writer in list(self._optional):
            try:
                getattr(writer, method)(*args)
            except Exception as error:
                self._optional.remove(writer)
                _log.warning('%s stopped: %s', type(writer).__name__, error)


def cut_after(path: epath.Path, step: int) -> None:
    """Drops the rows beyond a step and a torn last line, atomically."""
    if not path.exists():
        return
    text = path.read_text()
    kept = ''.join(line for line in text.splitlines(keepends=True) if _is_row_up_to(line, step))
    if kept != text:
        temporary = path.parent / f'.{path.name}.tmp'
        temporary.write_text(kept)
        temporary.replace(path)


def _is_row_up_to(line: str, step: int) -> bool:
    try:
        return line.endswith('\n') and json.loads(line)['step'] <= step
    except (ValueError, KeyError, TypeError):
        return False
