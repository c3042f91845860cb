# SPDX-License-Identifier: Apache-2.0
"""Source for .npz files, with one array per field."""

from __future__ import annotations

import os

import numpy as np

from .sources import ArraySource


class Npz(ArraySource):
    """The arrays of an .npz file, such as features that were computed once, held in memory."""

    def __init__(self, path: str | os.PathLike[str], *, limit: int | None = None):
        """Reads the file.

        Args:
            path: a file written by `numpy.savez`; each array is (examples, ...).
            limit: use only this many examples from the start.

        Raises:
            ValueError: if the arrays differ in length, or there are none.
        """
        # Pickles could run any code, and arrays of objects are no batches.
        with np.load(os.path.expanduser(path), allow_pickle=False) as arrays:
            super().__init__(dict(arrays), limit=limit)
