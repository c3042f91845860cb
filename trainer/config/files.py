# SPDX-License-Identifier: Apache-2.0
"""Atomic file writes, on disks and object stores."""

from __future__ import annotations

import contextlib
import io
import os
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath


def replace(path: epath.Path, content: bytes | memoryview | str, *, sync: bool = False) -> None:
    """Writes a file atomically: readers see either the old or the new content, complete.

    Args:
        path: the file; it is replaced if it exists.
        content: bytes, or text to encode as UTF-8.
        sync: whether the content must be on the disk before the old file is replaced.

    Raises:
        OSError: if the file cannot be written; the old file is unchanged then.
    """
    # In the same directory, because a rename is atomic only within a file system.
    temporary = path.parent / f'.{path.name}.tmp'
    try:
        with temporary.open('wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                fsync(file)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def fsync(file: IO[Any]) -> None:
    """Blocks until the content of a file is on the disk."""
    file.flush()
    # A file in an object store has no descriptor; its content is safe once it is closed.
    with contextlib.suppress(io.UnsupportedOperation):
        os.fsync(file.fileno())
