# SPDX-License-Identifier: Apache-2.0
"""A digest that identifies which examples were trained on, in which order."""

from __future__ import annotations

import numpy as np

PADDING = -1  # Id of a row of padding.

_MAX_PENDING = 2**15  # ids


class DataDigest:
    """Sum modulo 2^64 of mix(step, row, example id) over all rows of all consumed batches.

    It does not depend on how rows are divided over processes and steps over calls, and changes if
    one example is in another row or step. Steps are counted over the whole run, also after a change
    of the batch size, so the digest covers the batch sizes and the steps at which they changed.
    """

    def __init__(self) -> None:
        """Starts with no batches."""
        self._total = 0
        # Batches not yet added to the total: hashing many at once takes a fraction of the time.
        self._pending: list[tuple[int, np.ndarray]] = []
        self._num_pending = 0  # ids
        self._rows: np.ndarray | None = None

    def restore(self, value: str) -> None:
        """Continues from the `value` of an earlier digest, and discards what was added."""
        self._pending, self._num_pending = [], 0
        self._total = int(value, 16)

    @property
    def value(self) -> str:
        """16 hexadecimal digits."""
        self._sum_up()
        return f'{self._total:016x}'

    def add(self, start: int, ids: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Adds the batches from step `start` on.

        Args:
            start: step of the first batch.
            ids: int64 (steps, rows); -1 is padding, which is left out.
            rows: indices of the rows in the global batch, int64 (rows,); by default all from 0.
        """
        # Pending blocks are concatenated, so they must have the same rows. `is` suffices, and costs
        # nothing: the caller passes the same array each time.
        if self._pending and not (
            rows is self._rows and ids.shape[1] == self._pending[-1][1].shape[1]
        ):
            self._sum_up()
        self._rows = rows
        self._pending.append((start, ids))
        self._num_pending += ids.size
        if self._num_pending > _MAX_PENDING:
            self._sum_up()

    def _sum_up(self) -> None:
        if not self._pending:
            return
        steps = np.concatenate([np.arange(start, start + len(x)) for start, x in self._pending])
        ids = np.concatenate([x for _, x in self._pending])
        rows = np.arange(ids.shape[1]) if self._rows is None else self._rows
        self._pending, self._num_pending = [], 0
        # A sum does not depend on the order, so processes and calls can add up their parts
        # independently.
        words = _hash(steps[:, None], rows[None, :], ids)[ids != PADDING]
        self._total = (self._total + int(words.sum(dtype=np.uint64))) % 2**64


def _hash(*parts: np.ndarray) -> np.ndarray:
    """Returns one uint64 hash of several integers (arrays broadcast), which depends on their order.

    Each is added and mixed by the finalizer of splitmix64 (Steele et al., 2014). The constants must
    never change, so that digests of earlier runs stay comparable.
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
