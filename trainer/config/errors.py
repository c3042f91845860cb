# SPDX-License-Identifier: Apache-2.0
"""`UserError`, a user's mistake reported without a traceback, and helpers for messages."""

from __future__ import annotations

import re

from trainer import compat

# Far above any message of ours: only a line that quotes a huge value reaches it.
_MAX_LINE_CHARACTERS = 2000


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


def full_text(error: BaseException) -> str:
    """Returns the text of an error with its notes, to print without a traceback.

    Lines that quote a value of thousands of characters are shortened.
    """
    text = '\n'.join([str(error), *error_notes(error)])
    return '\n'.join(shorten(line, _MAX_LINE_CHARACTERS) for line in text.split('\n'))


def error_notes(error: BaseException) -> list[str]:
    """Returns the notes of an error, except for JAX's note about the frames that it filters."""
    return [note for note in getattr(error, '__notes__', ()) if not compat.is_frames_note(note)]
