# SPDX-License-Identifier: Apache-2.0
"""Mistakes of the user, told without a traceback."""

from __future__ import annotations

# What JAX's own note names, which says nothing of the error.
_JAXS = 'JAX_TRACEBACK_FILTERING'


class UserError(Exception):
    """What was given, what was expected, where, and how to fix it: the complete text to print."""

    exit_code = 2


def full_text(error: BaseException) -> str:
    """Returns the text of an error and its notes, to print without a traceback."""
    return '\n'.join([str(error), *notes_of(error)])


def notes_of(error: BaseException) -> list[str]:
    """Returns the notes of an error, without that of JAX about frames that it leaves out."""
    return [note for note in getattr(error, '__notes__', ()) if _JAXS not in note]
