# SPDX-License-Identifier: Apache-2.0
"""`UserError`, a user's mistake reported without a traceback, and the parts of messages."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Sequence

from trainer import compat

# Folders of all code that is not the user's.
_LIBRARIES = (
    *(sysconfig.get_path(name) for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')),
    os.path.dirname(os.path.dirname(__file__)),
)

# Far above any message of ours: only a line that quotes a huge value reaches it.
_MAX_LINE_CHARACTERS = 2000

_MAX_LIST_LINES = 10


class UserError(Exception):
    """A mistake of the user.

    Its text is all that is printed: what was given, what was expected, where, and how to fix it.
    """

    exit_code = 2


def short_repr(value: object, limit: int = 100) -> str:
    """Returns the repr of a value on one line, for a message.

    Args:
        value: anything; a value from the command line may have thousands of characters.
        limit: number of characters above which the middle is left out.
    """
    try:
        # The repr of an array spans several lines, and a message quotes it within one.
        text = re.sub(r'\s*\n\s*', ' ', repr(value))
    # Python refuses to print an integer of thousands of digits, and a dict may contain itself.
    except (ValueError, RecursionError):
        return f'a very long {type(value).__name__}'
    return shorten(text, limit)


def shorten(text: str, limit: int = 100) -> str:
    """Returns a text, without its middle if it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    # The end helps too: of a path, the last key is there.
    return f'{text[: limit * 2 // 3]}...{text[-limit // 6 :]} ({len(text):,} characters)'


def and_more(items: Sequence[str], limit: int, separator: str = ', ') -> str:
    """Returns 'a, b, c', or 'a, b and 3 more' for more than `limit` items."""
    more = f' and {len(items) - limit} more' if len(items) > limit else ''
    return separator.join(items[:limit]) + more


def indented_list(items: Iterable[str], limit: int = _MAX_LIST_LINES) -> str:
    """Returns an indented line per item; beyond `limit`, a last line counts the others."""
    lines = [f'  {item}' for item in items]
    more = [f'  and {len(lines) - limit} more'] if len(lines) > limit else []
    return '\n'.join([*lines[:limit], *more])


def full_text(error: BaseException) -> str:
    """Returns the text of an error with its notes, to print without a traceback.

    Lines that quote a value of thousands of characters are shortened.
    """
    text = '\n'.join([str(error), *error_notes(error)])
    return '\n'.join(shorten(line, _MAX_LINE_CHARACTERS) for line in text.split('\n'))


def error_notes(error: BaseException) -> list[str]:
    """Returns the notes of an error, except for JAX's note about the frames that it filters."""
    return [note for note in getattr(error, '__notes__', ()) if not compat.is_frames_note(note)]


def error_location(error: BaseException) -> str:
    """Returns ' (file.py, line 3)' for the last frame in the user's code, '' if there is none."""
    frames = user_frames(error)
    return f' ({frames[-1].filename}, line {frames[-1].lineno})' if frames else ''


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Returns the frames of an error's traceback that are in the user's code."""
    stack = traceback.extract_tb(error.__traceback__)
    return [frame for frame in stack if not is_library(frame.filename)]


def is_library(filename: str) -> bool:
    """Whether a file belongs to Python, an installed package or this package, not to the user."""
    # With a separator at the end: '/lib/python3' is not a parent of '/lib/python3-mine'.
    folders = tuple(os.path.join(folder, '') for folder in _LIBRARIES)
    return filename.startswith(('<frozen', *folders))
