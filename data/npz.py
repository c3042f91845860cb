# SPDX-License-Identifier: Apache-2.0
"""A source that numpy has saved: one array for each field."""

from __future__ import annotations

import os

import numpy as np

from .sources import ArraySource


class Npz(ArraySource):
    """The arrays of an .npz file, such as features that were computed once, held in memory."""

    def __init__(self, path: str | os.PathLike[str], *, limit: int | None = None):
        """Reads the file.

        Args:
            path: what `numpy.savez` has written; each array is (examples, ...).
            limit: use only this many examples from the start.

        Raises:
            ValueError: if the lengths differ or there is nothing.
        """
        with np.load(os.path.expanduser(path), allow_pickle=False) as arrays:
            super().__init__(dict(arrays), limit=limit)
