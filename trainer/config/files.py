# SPDX-License-Identifier: Apache-2.0
"""Atomic writes of files, on disks and object stores."""

from __future__ import annotations

import contextlib
import io
import os
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath


def replace(path: epath.Path, content: bytes | memoryview | str, *, sync: bool = False) -> None:
    """Writes a file, over one of that name; a reader finds either of them whole.

    Args:
        path: the file.
        content: of it; text is written as UTF-8.
        sync: whether it must be on the disk before the file before it is gone.

    Raises:
        OSError: if it cannot be written; then the file before it is as it was.
    """
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
    """Returns when what was written to a file is on the disk."""
    file.flush()
    # An object store has no descriptor: there the content is safe when the file is closed.
    with contextlib.suppress(io.UnsupportedOperation):
        os.fsync(file.fileno())
