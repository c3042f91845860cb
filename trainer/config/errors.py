# SPDX-License-Identifier: Apache-2.0
"""Mistakes of the user, told without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """What was given, what was expected, where, and how to mend it: the complete text to print."""

    exit_code = 2


def full_text(error: BaseException) -> str:
    """Returns the text of an error and its notes, to print without a traceback."""
    return '\n'.join([str(error), *getattr(error, '__notes__', ())])
