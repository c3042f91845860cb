# SPDX-License-Identifier: Apache-2.0
"""A number that proves which examples were trained on, in which order."""

from __future__ import annotations

import numpy as np

PADDING = -1  # The id of a row that holds no example.

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
        # Batches that are not summed up yet: to hash many at once takes a fraction of the time.
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._num_waiting = 0  # ids
        self._rows: np.ndarray | None = None

    def restore(self, value: str) -> None:
        """Continues from the `value` of an earlier digest, and forgets what was added."""
        self._waiting, self._num_waiting = [], 0
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
            rows: places of the rows in the global batch, int64 (rows,); by default all from 0.
        """
        if self._waiting and not (
            rows is self._rows and ids.shape[1] == self._waiting[-1][1].shape[1]
        ):
            self._sum_up()
        self._rows = rows
        self._waiting.append((start, ids))
        self._num_waiting += ids.size
        if self._num_waiting > _MOST_WAITING:
            self._sum_up()

    def _sum_up(self) -> None:
        if not self._waiting:
            return
        steps = np.concatenate([np.arange(start, start + len(x)) for start, x in self._waiting])
        ids = np.concatenate([x for _, x in self._waiting])
        rows = np.arange(ids.shape[1]) if self._rows is None else self._rows
        self._waiting, self._num_waiting = [], 0
        words = _hash(steps[:, None], rows[None, :], ids)[ids != PADDING]
        self._total = (self._total + int(words.sum(dtype=np.uint64))) % 2**64


def _hash(*parts: np.ndarray) -> np.ndarray:
    """Returns one uint64 of several integers (arrays broadcast), which depends on their order.

    Each is added and scrambled by the finaliser of splitmix64 (Steele et al., 2014). The constants
    must never change: digests of earlier runs must stay comparable.
    """
    key = np.zeros((), np.uint64)
    with np.errstate(over='ignore'):  # Arithmetic is modulo 2^64.
        for part in parts:
            x = key * np.uint64(0x9E3779B97F4A7C15) + part.astype(np.uint64)
            x = x + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            key = x ^ (x >> np.uint64(31))
    return key
