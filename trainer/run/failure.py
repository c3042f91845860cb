# SPDX-License-Identifier: Apache-2.0
"""Descriptions of errors that end a run, for files and hooks."""

from __future__ import annotations

import pathlib
import traceback
from typing import Any

from trainer.config import traces

# Messages of XLA can have thousands of lines; the full text is in `debug.log`.
_MAX_LINES = 8
_MAX_LINE = 500


class NonFiniteError(RuntimeError):
    """A value was not finite, and the guard has stopped the run; the message says where."""

    exit_code = 1
    status = 'diverged'


def status(error: BaseException) -> str:
    """Returns the status of a run that an error ended: the error's own `status`, or 'failed'."""
    if isinstance(error, KeyboardInterrupt):  # In a notebook, where no handler requests a save.
        return 'interrupted'
    return str(getattr(error, 'status', 'failed'))


def describe(error: BaseException, step: int) -> dict[str, Any]:
    """Returns the 'error' entry of `result.json`.

    Args:
        error: the exception that ended the run.
        step: number of completed updates when it was raised.
    """
    lines = str(error).splitlines()
    first_lines = [line[:_MAX_LINE] for line in lines[:_MAX_LINES]]
    if len(lines) > len(first_lines):
        first_lines.append('...')
    return {
        'type': type(error).__name__,
        'message': '\n'.join(first_lines),
        'where': _location(error),
        'step': step,
    }


def summary(error: BaseException) -> str:
    """Returns 'ValueError: MESSAGE' with the first line of the message."""
    first = next(iter(str(error).splitlines()), '')[:_MAX_LINE]
    return f'{type(error).__name__}: {first}' if first else type(error).__name__


def _location(error: BaseException) -> str | None:
    """Returns 'file.py:10 in f': the innermost frame of user code, or else of the trainer."""
    # The innermost frame is usually inside JAX or this package; users look for their own line.
    if (own_place := traces.user_location(error)) is not None:
        return own_place
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if 'site-packages' not in pathlib.Path(f.filename).parts]
    frame = next(reversed(own or frames), None)
    return None if frame is None else f'{frame.filename}:{frame.lineno} in {frame.name}'
