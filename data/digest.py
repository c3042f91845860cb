# SPDX-License-Identifier: Apache-2.0
"""A number that proves which examples were trained on, in which order."""

from __future__ import annotations

import numpy as np

from .order import PADDING, combine


class DataDigest:
    """Sum modulo 2^64 of mix(step, row, example id) over all rows of all consumed batches.

    Equal for any division of the rows over processes and of the steps over calls, and different as
    soon as one example stands in another row or step.
    """

    def __init__(self) -> None:
        """Starts from nothing."""
        self._total = 0

    def restore(self, value: str) -> None:
        """Goes on from the `value` of an earlier digest."""
        self._total = int(value, 16)

    @property
    def value(self) -> str:
        """16 hexadecimal digits."""
        return f'{self._total:016x}'

    def add(self, start: int, ids: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Counts the batches from position `start` on.

        Args:
            start: position of the first batch.
            ids: int64 (steps, rows); -1 is padding and does not count.
            rows: places of the rows in the global batch, (rows,); by default all from 0.
        """
        steps = start + np.arange(len(ids))[:, None]
        places = np.arange(ids.shape[1]) if rows is None else rows
        words = combine(steps, places[None, :], ids)[ids != PADDING]
        self._total = (self._total + int(words.sum(dtype=np.uint64))) % 2**64
