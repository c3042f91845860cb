# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a checkpoint."""

from __future__ import annotations

import errno

from trainer import compat

# A file system that was away for a while; a full disk or a missing right stays as it is.
_PASSING = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN}


class CheckpointError(Exception):
    """A checkpoint that cannot be trusted: unreadable, or other arrays than those saved."""

    exit_code = 65


class SaveError(CheckpointError):
    """A save that failed; earlier checkpoints are unchanged.

    Attributes:
        may_pass: whether a later save may succeed without any change.
        occurred: whether a save has failed in this process.
    """

    exit_code = 1
    occurred = False

    def __init__(self, text: str, *, may_pass: bool):
        """Takes the complete text to print."""
        super().__init__(text)
        self.may_pass = may_pass
        SaveError.occurred = True


def may_pass(error: BaseException) -> bool:
    """Whether an error of a save is one that goes away by itself."""
    return compat.os_error_number(error) in _PASSING


def first_line(error: BaseException) -> str:
    """Returns 'ValueError: text', without the pages that TensorStore adds, its end kept."""
    line = compat.without_details(error)
    short = line if len(line) <= 300 else f'{line[:100]} ... {line[-200:]}'
    return f'{type(error).__name__}: {short}'
