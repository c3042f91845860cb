# SPDX-License-Identifier: Apache-2.0
"""Tracebacks reduced to the user's own frames."""

from __future__ import annotations

import itertools
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from trainer.config.errors import error_notes
from trainer.config.objects import is_library

# The switch with which JAX, too, shows all of its frames.
_SWITCH = 'JAX_TRACEBACK_FILTERING'
_MOST_LINES = 12
_MOST_REPEATS = 3

# As Python says it.
_CAUSED = 'The above exception was the direct cause of the following exception:'
_DURING = 'During handling of the above exception, another exception occurred:'

# Where the frames are that are left out, if they are in no file.
SHOWN = f'{_SWITCH}=off shows them'


def format_traceback(error: BaseException, *, elsewhere: str = SHOWN) -> str:
    """Returns a traceback as Python writes it, with the user's frames alone, and whole statements.

    All of it, if no frame is the user's or if JAX_TRACEBACK_FILTERING=off is in the environment.

    Args:
        error: what was raised; what it was raised from is shown too.
        elsewhere: where the other frames are, for the line that says so.
    """
    chain = _chain(error)
    is_whole = os.environ.get(_SWITCH, '').lower() == 'off'
    groups = any(isinstance(each, BaseExceptionGroup) for each in chain)
    if is_whole or groups or not any(map(_user_frames, chain)):
        return ''.join(traceback.format_exception(error)).rstrip()
    shown = _format_error(chain[0], elsewhere)
    for before, after in itertools.pairwise(chain):
        how = _CAUSED if after.__cause__ is before else _DURING
        shown += f'\n\n{how}\n\n{_format_error(after, elsewhere)}'
    return shown


def install(elsewhere: Callable[[], str]) -> None:
    """Shows an error that ends the process as `shorten` does, on standard error."""

    def hook(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            print(format_traceback(error, elsewhere=elsewhere()), file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, error.__traceback__)

    sys.excepthook = hook


def user_location(error: BaseException) -> str | None:
    """Returns 'file.py:10 in f' for the last frame of the user, None if there is none."""
    frame = next(reversed(_user_frames(error)), None)
    return None if frame is None else f'{frame.filename}:{frame.lineno} in {frame.name}'


def _format_error(error: BaseException, elsewhere: str) -> str:
    frames, own = traceback.extract_tb(error.__traceback__), _user_frames(error)
    lines = ['Traceback (most recent call last):'] if own else []
    if len(own) < len(frames):
        lines.append(f'  [frames of libraries are left out: {elsewhere}]')
    for frame, repeats in _group_repeats(own):
        lines.append(f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}')
        lines += [f'    {line}' for line in _statement_lines(frame)]
        if repeats:
            lines.append(f'  [repeated {repeats} more times]')
    lines += [line.rstrip('\n') for line in _message_lines(error)]
    return '\n'.join(lines)


def _group_repeats(
    frames: Sequence[traceback.FrameSummary],
) -> Iterator[tuple[traceback.FrameSummary, int]]:
    """Yields frames, of a recursion the first few, and how many more of one there are."""
    for _, group in itertools.groupby(frames, key=lambda f: (f.filename, f.lineno, f.name)):
        same = list(group)
        shown = same[:_MOST_REPEATS]
        yield from ((frame, 0) for frame in shown[:-1])
        yield shown[-1], len(same) - len(shown)


def _message_lines(error: BaseException) -> Iterator[str]:
    """Yields the lines of an error's own text and its notes, without JAX's about its frames."""
    whole = traceback.TracebackException.from_exception(error)
    whole.__notes__ = error_notes(error)
    yield from whole.format_exception_only()


def _statement_lines(frame: traceback.FrameSummary) -> list[str]:
    """Returns all lines of a frame's statement, without their common indentation."""
    first = frame.lineno or 0
    last = min(frame.end_lineno or first, first + _MOST_LINES - 1)
    lines = [
        linecache.getline(frame.filename, number).rstrip() for number in range(first, last + 1)
    ]
    indent = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    return [line[indent:] for line in lines if line]


def _user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    frames = traceback.extract_tb(error.__traceback__)
    # What libraries generate, such as the constructor of a dataclass, has no source either.
    return [f for f in frames if not is_library(f.filename) and (f.line or f.filename[0] != '<')]


def _chain(error: BaseException) -> list[BaseException]:
    """Returns what led to an error, as Python would show it, the error itself last."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and not any(current is each for each in found):
        found.append(current)
        hidden = current.__cause__ is None and current.__suppress_context__
        current = None if hidden else current.__cause__ or current.__context__
    return found[::-1]
