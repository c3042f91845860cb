# SPDX-License-Identifier: Apache-2.0
"""Describes errors that end a run, for files and hooks."""

from __future__ import annotations

import pathlib
import traceback
from typing import Any

from trainer.config import traces

_MAX_LINES = 8
_MAX_LINE = 500


class NonFiniteError(RuntimeError):
    """A run has been stopped because a value was not finite; the message says where it began."""

    exit_code = 1
    status = 'diverged'


def status(error: BaseException) -> str:
    """Returns the status of a run that an error ended: 'failed', or the error's own `status`."""
    if isinstance(error, KeyboardInterrupt):  # In a notebook, where no handler asks for a save.
        return 'interrupted'
    return str(getattr(error, 'status', 'failed'))


def describe(error: BaseException, step: int) -> dict[str, Any]:
    """Returns an error for `result.json`.

    Args:
        error: what was raised.
        step: number of completed updates when it was.
    """
    lines = str(error).splitlines()
    shown = [line[:_MAX_LINE] for line in lines[:_MAX_LINES]]
    if len(lines) > len(shown):
        shown.append('...')
    return {
        'type': type(error).__name__,
        'message': '\n'.join(shown),
        'where': _where(error),
        'step': step,
    }


def summary(error: BaseException) -> str:
    """Returns 'ValueError: its message', in one line."""
    first = next(iter(str(error).splitlines()), '')[:_MAX_LINE]
    return f'{type(error).__name__}: {first}' if first else type(error).__name__


def _where(error: BaseException) -> str | None:
    """Returns 'file.py:10 in f': the user's innermost frame, or else the program's own."""
    if (own_place := traces.own_place(error)) is not None:
        return own_place
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if 'site-packages' not in pathlib.Path(f.filename).parts]
    frame = next(reversed(own or frames), None)
    return None if frame is None else f'{frame.filename}:{frame.lineno} in {frame.name}'
