# SPDX-License-Identifier: Apache-2.0
"""Formats tracebacks with the user's own frames only."""

from __future__ import annotations

import itertools
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from trainer.config.errors import error_notes, user_frames

# The environment variable that controls JAX's own filtering of tracebacks.
_SWITCH = 'JAX_TRACEBACK_FILTERING'
_MAX_STATEMENT_LINES = 12
_MAX_REPEATS = 3

# The texts that Python writes between the errors of a chain.
_CAUSED = 'The above exception was the direct cause of the following exception:'
_DURING = 'During handling of the above exception, another exception occurred:'

# How to see the frames that are left out, unless a file has them.
HOW_TO_SEE_ALL = f'{_SWITCH}=off shows them'


def format_traceback(error: BaseException, *, elsewhere: str = HOW_TO_SEE_ALL) -> str:
    """Returns a traceback in Python's format, with the user's frames only.

    It is complete if there are no such frames, or if JAX_TRACEBACK_FILTERING=off is set.

    Args:
        error: the error; those that it was raised from are included.
        elsewhere: where the other frames can be found, for the line that replaces them.
    """
    chain = _chain(error)
    is_unfiltered = os.environ.get(_SWITCH, '').lower() == 'off'
    # A group has a tree of tracebacks, which only Python's own format shows.
    has_group = any(isinstance(each, BaseExceptionGroup) for each in chain)
    if is_unfiltered or has_group or not any(map(_user_frames, chain)):
        return ''.join(traceback.format_exception(error)).rstrip()
    text = _format_error(chain[0], elsewhere)
    for before, after in itertools.pairwise(chain):
        link = _CAUSED if after.__cause__ is before else _DURING
        text += f'\n\n{link}\n\n{_format_error(after, elsewhere)}'
    return text


def install(elsewhere: Callable[[], str]) -> None:
    """Makes Python print an uncaught error with `format_traceback`.

    Args:
        elsewhere: returns where the other frames can be found, at the time of the error.
    """

    def hook(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            print(format_traceback(error, elsewhere=elsewhere()), file=sys.stderr)
        else:  # KeyboardInterrupt and the like.
            sys.__excepthook__(kind, error, error.__traceback__)

    sys.excepthook = hook


def user_location(error: BaseException) -> str | None:
    """Returns 'file.py:10 in f' for the last frame in the user's code, None if there is none."""
    frame = next(reversed(_user_frames(error)), None)
    return None if frame is None else f'{frame.filename}:{frame.lineno} in {frame.name}'


def _format_error(error: BaseException, elsewhere: str) -> str:
    frames, user_frames = traceback.extract_tb(error.__traceback__), _user_frames(error)
    lines = ['Traceback (most recent call last):'] if user_frames else []
    if len(user_frames) < len(frames):
        lines.append(f'  [frames of libraries are left out: {elsewhere}]')
    for frame, repeats in _group_repeats(user_frames):
        lines.append(f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}')
        lines += [f'    {line}' for line in _statement_lines(frame)]
        if repeats:
            lines.append(f'  [repeated {repeats} more times]')
    lines += [line.rstrip('\n') for line in _message_lines(error)]
    return '\n'.join(lines)


def _group_repeats(
    frames: Sequence[traceback.FrameSummary],
) -> Iterator[tuple[traceback.FrameSummary, int]]:
    """Yields (frame, number of repetitions left out); of a recursion, the first few frames."""
    for _, group in itertools.groupby(frames, key=lambda f: (f.filename, f.lineno, f.name)):
        same = list(group)
        first = same[:_MAX_REPEATS]
        yield from ((frame, 0) for frame in first[:-1])
        yield first[-1], len(same) - len(first)


def _message_lines(error: BaseException) -> Iterator[str]:
    """Yields the lines of an error's text and notes, except for JAX's note about its frames."""
    formatter = traceback.TracebackException.from_exception(error)
    formatter.__notes__ = error_notes(error)
    yield from formatter.format_exception_only()


def _statement_lines(frame: traceback.FrameSummary) -> list[str]:
    """Returns all lines of a frame's statement, without their common indentation."""
    # Python shows the first line only, of a call over several lines often just `return f(`.
    first = frame.lineno or 0
    last = min(frame.end_lineno or first, first + _MAX_STATEMENT_LINES - 1)
    lines = [
        linecache.getline(frame.filename, number).rstrip() for number in range(first, last + 1)
    ]
    indent = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    return [line[indent:] for line in lines if line]


def _user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    # Generated code, such as the constructor of a dataclass, has a name like '<string>' and no
    # source.
    return [f for f in user_frames(error) if f.line or f.filename[0] != '<']


def _chain(error: BaseException) -> list[BaseException]:
    """Returns the errors that Python would print for an error, which comes last."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    # By identity, since a chain may be a cycle, and errors may compare equal.
    while current is not None and not any(current is each for each in chain):
        chain.append(current)
        # `raise ... from None` hides the context.
        is_last = current.__cause__ is None and current.__suppress_context__
        current = None if is_last else current.__cause__ or current.__context__
    return chain[::-1]
