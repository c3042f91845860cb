# SPDX-License-Identifier: Apache-2.0
"""Reads a file of a dataset, and checks that its content is the expected one."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import zlib


def read_bytes(path: pathlib.Path, sha256: str | None = None) -> bytes:
    """Returns the content of a file, unpacked if its name ends in '.gz'.

    Args:
        path: the file.
        sha256: checksum of its unpacked content; None for any content.

    Raises:
        ValueError: if the file cannot be read, or its content is another.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == '.gz' else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f'{path} cannot be read: {error}') from error
    if sha256 and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f'{path} is damaged: its content has sha256 {found}, not {sha256}')
    return content
