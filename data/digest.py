# SPDX-License-Identifier: Apache-2.0
"""A number that proves which examples were trained on, in which order."""

from __future__ import annotations

import numpy as np

from .order import PADDING, combine

_MOST_WAITING = 2**15  # ids


class DataDigest:
    """Sum modulo 2^64 of mix(step, row, example id) over all rows of all consumed batches.

    Equal for any division of the rows over processes and of the steps over calls, and different as
    soon as one example is in another row or step. Steps are those of the run, also after a change
    of the batch size, so the digest also covers which sizes were used, and from which step on.
    """

    def __init__(self) -> None:
        """Starts from nothing."""
        self._total = 0
        # Of many batches at once it takes a fraction of the time.
        self._steps: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []
        self._places: np.ndarray | None = None

    def restore(self, value: str) -> None:
        """Goes on from the `value` of an earlier digest."""
        self._steps, self._ids = [], []
        self._total = int(value, 16)

    @property
    def value(self) -> str:
        """16 hexadecimal digits."""
        self._sum_up()
        return f'{self._total:016x}'

    def add(self, start: int, ids: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Counts the batches from position `start` on.

        Args:
            start: position of the first batch.
            ids: int64 (steps, rows); -1 is padding and does not count.
            rows: places of the rows in the global batch, (rows,); by default all from 0.
        """
        places = np.arange(ids.shape[1]) if rows is None else rows
        if self._places is not None and not np.array_equal(places, self._places):
            self._sum_up()
        self._places = places
        self._steps.append(start + np.arange(len(ids)))
        self._ids.append(ids)
        if sum(x.size for x in self._ids) > _MOST_WAITING:
            self._sum_up()

    def _sum_up(self) -> None:
        if not self._ids or self._places is None:
            return
        steps, ids = np.concatenate(self._steps), np.concatenate(self._ids)
        self._steps, self._ids = [], []
        words = combine(steps[:, None], self._places[None, :], ids)[ids != PADDING]
        self._total = (self._total + int(words.sum(dtype=np.uint64))) % 2**64
