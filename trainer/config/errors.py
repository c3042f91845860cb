# SPDX-License-Identifier: Apache-2.0
"""`UserError`, a user's mistake reported without a traceback, and helpers for messages."""

from __future__ import annotations

import re

from trainer import compat

_LONGEST_LINE = 2000


class UserError(Exception):
    """What was given, what was expected, where, and how to fix it: the complete text to print."""

    exit_code = 2


def short_repr(value: object, limit: int = 100) -> str:
    """Returns the repr of a value for a message, shortened in the middle beyond `limit` characters.

    A text of the command line may have thousands of characters.
    """
    try:
        # That of an array has several lines.
        text = re.sub(r'\s*\n\s*', ' ', repr(value))
    except (ValueError, RecursionError):  # An integer of thousands of digits; a dict in itself.
        return f'a very long {type(value).__name__}'
    return shorten(text, limit)


def shorten(text: str, limit: int = 100) -> str:
    """Returns a text whose middle is left out if it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    return f'{text[: limit * 2 // 3]}...{text[-limit // 6 :]} ({len(text):,} characters)'


def full_text(error: BaseException) -> str:
    """Returns the text of an error and its notes, to print without a traceback.

    A line that repeats a value of thousands of characters is shortened.
    """
    text = '\n'.join([str(error), *error_notes(error)])
    return '\n'.join(shorten(line, _LONGEST_LINE) for line in text.split('\n'))


def error_notes(error: BaseException) -> list[str]:
    """Returns the notes of an error, without that of JAX about frames that it leaves out."""
    return [note for note in getattr(error, '__notes__', ()) if not compat.is_frames_note(note)]
