# SPDX-License-Identifier: Apache-2.0
"""Tracebacks cut down to the user's own frames: the last one is where the error is."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType

from trainer.config.errors import notes_of
from trainer.config.objects import is_library

# The switch with which JAX, too, shows all of its frames.
_SWITCH = 'JAX_TRACEBACK_FILTERING'
_MOST_LINES = 12

# Where the frames are that are left out, if they are in no file.
SHOWN = f'{_SWITCH}=off shows them'


def shorten(error: BaseException, *, elsewhere: str = SHOWN) -> str:
    """Returns a traceback as Python writes it, with the user's frames alone, and whole statements.

    All of it, if no frame is the user's or if JAX_TRACEBACK_FILTERING=off is in the environment.

    Args:
        error: what was raised; what it was raised from is shown too if it has frames of the user.
        elsewhere: where the other frames are, for the line that says so.
    """
    chain = [each for each in _chain(error) if _own(each) or each is error]
    if os.environ.get(_SWITCH, '').lower() == 'off' or not any(map(_own, chain)):
        return ''.join(traceback.format_exception(error)).rstrip()
    return '\n\nand then:\n\n'.join(_shown(each, elsewhere) for each in chain)


def install(elsewhere: Callable[[], str]) -> None:
    """Shows an error that ends the process as `shorten` does, on standard error."""

    def hook(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            print(shorten(error, elsewhere=elsewhere()), file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, error.__traceback__)

    sys.excepthook = hook


def own_place(error: BaseException) -> str | None:
    """Returns 'file.py:10 in f' for the last frame of the user, None if there is none."""
    frame = next(reversed(_own(error)), None)
    return None if frame is None else f'{frame.filename}:{frame.lineno} in {frame.name}'


def _shown(error: BaseException, elsewhere: str) -> str:
    frames, own = traceback.extract_tb(error.__traceback__), _own(error)
    lines = ['Traceback (most recent call last):']
    if len(own) < len(frames):
        lines.append(f'  [frames of libraries are left out: {elsewhere}]')
    for frame in own:
        lines.append(f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}')
        lines += [f'    {line}' for line in _statement(frame)]
    lines += [line.rstrip('\n') for line in _message(error)]
    return '\n'.join(lines)


def _message(error: BaseException) -> Iterator[str]:
    """Yields the lines of an error's own text and its notes, without JAX's about its frames."""
    whole = traceback.TracebackException.from_exception(error)
    whole.__notes__ = notes_of(error)
    yield from whole.format_exception_only()


def _statement(frame: traceback.FrameSummary) -> list[str]:
    """Returns all lines of a frame's statement, without their common indentation."""
    first = frame.lineno or 0
    last = min(frame.end_lineno or first, first + _MOST_LINES - 1)
    lines = [
        linecache.getline(frame.filename, number).rstrip() for number in range(first, last + 1)
    ]
    indent = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    return [line[indent:] for line in lines if line]


def _own(error: BaseException) -> list[traceback.FrameSummary]:
    frames = traceback.extract_tb(error.__traceback__)
    # What libraries generate, such as the constructor of a dataclass, has no source either.
    return [f for f in frames if not is_library(f.filename) and (f.line or f.filename[0] != '<')]


def _chain(error: BaseException) -> list[BaseException]:
    """Returns what led to an error, as Python would show it, the error itself last."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        hidden = current.__cause__ is None and current.__suppress_context__
        current = None if hidden else current.__cause__ or current.__context__
    return found[::-1]
