# SPDX-License-Identifier: Apache-2.0
"""Reads IDX files, the format of MNIST and of data sets like it."""

from __future__ import annotations

import pathlib

import numpy as np

from .checked_file import read_bytes


def read(path: pathlib.Path, sha256: str) -> np.ndarray:
    """Returns the array of a gzip-compressed IDX file of bytes, uint8; it cannot be written to.

    Args:
        path: the file.
        sha256: checksum of its unpacked content.

    Raises:
        ValueError: if the file cannot be read, or its content is another.
    """
    content = read_bytes(path, sha256)
    # Two zeros, the type of the elements, the number of dimensions, and the size of each.
    dims = content[3]
    shape = np.frombuffer(content, '>i4', count=dims, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 * (dims + 1)).reshape(shape)
