# SPDX-License-Identifier: Apache-2.0
"""Errors of checkpoints, and the test for temporary ones."""

from __future__ import annotations

import errno

from trainer import compat

# Errors of a file system with which a file is not there, or is another one.
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
# Errors of a file system that is unavailable for a while. A full disk or a missing permission needs
# a user, so it ends the run instead of failing save after save.
_TEMPORARY = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN}


class CheckpointError(Exception):
    """A checkpoint is unreadable, or its arrays differ from those that were saved."""

    exit_code = 65


class DamageError(CheckpointError):
    """A checkpoint is not what was saved, and never will be: training falls back to an older one.

    Unlike, for example, one that a user has no permission to read.
    """


class SaveError(CheckpointError):
    """A save failed; earlier checkpoints are unchanged.

    Attributes:
        is_temporary: whether a later save may succeed without any change.
        occurred: whether a save has failed in this process.
    """

    exit_code = 1
    occurred = False

    def __init__(self, text: str, *, is_temporary: bool):
        """Keeps the complete message."""
        super().__init__(text)
        self.is_temporary = is_temporary
        SaveError.occurred = True


def is_temporary(error: BaseException) -> bool:
    """Whether the error of a save is temporary, so that a later save may succeed."""
    return compat.os_error_number(error) in _TEMPORARY


def is_damage(error: BaseException) -> bool:
    """Whether the error of a read is due to the content of the files, not to the file system."""
    number = compat.os_error_number(error)
    return number is None or number in _MISSING


def first_line(error: BaseException) -> str:
    """Returns 'ValueError: text', without the details of TensorStore, shortened in the middle."""
    line = compat.without_details(error)
    short = line if len(line) <= 300 else f'{line[:100]} ... {line[-200:]}'
    return f'{type(error).__name__}: {short}'
