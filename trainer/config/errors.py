# SPDX-License-Identifier: Apache-2.0
"""Mistakes of the user, told without a traceback."""

from __future__ import annotations

_OF_JAX = 'JAX has removed its internal frames'


class UserError(Exception):
    """What was given, what was expected, where, and how to mend it: the complete text to print."""

    exit_code = 2


def full_text(error: BaseException) -> str:
    """Returns the text of an error and its notes, to print without a traceback."""
    notes = getattr(error, '__notes__', ())
    # JAX notes on whatever leaves a traced function that its traceback is short.
    return '\n'.join([str(error), *(note for note in notes if _OF_JAX not in note)])
