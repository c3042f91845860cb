# SPDX-License-Identifier: Apache-2.0
"""Writes named arrays to an .npz file."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np
from etils import epath

from trainer.config import files
from trainer.config.errors import UserError


def write_npz(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Writes the file atomically, and returns its size in bytes.

    Object arrays of only text or only bytes are written as numpy text or bytes, which `numpy.load`
    reads without `allow_pickle`.

    Raises:
        UserError: for an array of other objects.
    """
    content = io.BytesIO()
    # Not with `numpy.savez`: its parameters 'file' and 'allow_pickle' could not be names of arrays.
    with zipfile.ZipFile(content, 'w') as file:
        for name, array in arrays.items():
            # zip64, because the size of an entry is not known when its header is written, and it
            # may exceed 2 GiB.
            with file.open(f'{name}.npy', 'w', force_zip64=True) as entry:
                np.lib.format.write_array(entry, _without_objects(name, array), allow_pickle=False)
    # Built in memory: a zip file is not written front to back, which object stores require.
    files.replace(path, content.getbuffer())
    return content.getbuffer().nbytes


def _without_objects(name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if not array.dtype.hasobject:
        return array
    items = array.ravel().tolist()
    for kind in (str, bytes):
        if all(type(item) is kind for item in items):
            # numpy pads items with zeros, so trailing zeros of an item would be lost.
            converted = np.array(items, kind).reshape(array.shape)
            if converted.ravel().tolist() == items:
                return converted
    kinds = ', '.join(sorted({type(item).__name__ for item in items}))
    raise UserError(
        f'{name!r} has Python objects ({kinds}), but only arrays of numbers or text can be '
        "written. Convert them to text, such as JSON, in the data's `transforms`"
    )
