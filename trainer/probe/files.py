# SPDX-License-Identifier: Apache-2.0
"""Arrays by name in a file that `numpy.load` reads."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np
from etils import epath


def write_npz(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Writes the file, whole or not at all, and returns its bytes.

    Unlike `numpy.savez` it takes any name, and any kind of path.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w') as file:
        for name, array in arrays.items():
            with file.open(f'{name}.npy', 'w', force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)
    temporary = path.parent / f'.{path.name}.tmp'
    try:
        temporary.write_bytes(content.getbuffer())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return content.getbuffer().nbytes
