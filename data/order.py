# SPDX-License-Identifier: Apache-2.0
"""The one global order of examples, as a pure function of (seed, position)."""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction

import numpy as np

PADDING = -1


def mix(x: np.ndarray) -> np.ndarray:
    """Returns uint64 values scrambled by the finaliser of splitmix64 (Steele et al., 2014)."""
    with np.errstate(over='ignore'):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def combine(*parts: np.ndarray | int) -> np.ndarray:
    """Returns one scrambled uint64 of several integers (arrays broadcast), order-sensitive."""
    key = np.zeros((), np.uint64)
    with np.errstate(over='ignore'):
        for part in parts:
            word = np.asarray(part).astype(np.uint64)
            key = mix(key * np.uint64(0x9E3779B97F4A7C15) + word + np.uint64(0x9E3779B97F4A7C15))
    return key


@functools.lru_cache(maxsize=2)
def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a permutation of range(examples), int64; read-only, the last two are kept.

    Sorted hashes and not numpy's shuffle: numpy may change its streams between versions, and a
    changed order would break resumed runs in silence.
    """
    order = np.argsort(combine(seed, epoch, np.arange(examples)), kind='stable')
    order.flags.writeable = False
    return order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """Which example each row of each training batch holds.

    Attributes:
        examples: length of the source.
        batch_size: rows of a global batch.
        seed: seed of the shuffle.
        shuffle: False keeps the source's order in every epoch.
        remainder: 'carry' runs batches across epoch borders, 'pad' fills an epoch's last batch up
            with padding, 'drop' leaves it out.
    """

    examples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    remainder: str = 'carry'

    def __post_init__(self) -> None:
        if self.remainder not in ('carry', 'pad', 'drop'):
            raise ValueError(f"remainder: {self.remainder!r} is none of 'carry', 'pad', 'drop'")
        if self.examples < 1 or self.batch_size < 1:
            raise ValueError(
                f'{self.examples} examples in batches of {self.batch_size}: both must be positive'
            )
        if self.remainder == 'drop' and self.examples < self.batch_size:
            raise ValueError(
                f"remainder='drop' leaves nothing of {self.examples} examples in batches of "
                f"{self.batch_size}; use 'carry' or 'pad'"
            )

    @property
    def steps_per_epoch(self) -> Fraction:
        """Batches in an epoch; a fraction only where batches run across epoch borders."""
        exact = Fraction(self.examples, self.batch_size)
        if self.remainder == 'carry':
            return exact
        whole = exact.numerator // exact.denominator
        return Fraction(whole + (self.remainder == 'pad' and exact != whole))

    def rows(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids, epochs), both int64 (count, batch_size), of the steps [start, start+count).

        An id of -1 is padding.
        """
        steps = np.arange(start, start + count)[:, None]
        row = np.arange(self.batch_size)[None, :]
        if self.remainder == 'carry':
            place = steps * self.batch_size + row
            epochs, offsets = place // self.examples, place % self.examples
        else:
            per_epoch = int(self.steps_per_epoch)
            epochs = np.broadcast_to(steps // per_epoch, (count, self.batch_size))
            offsets = steps % per_epoch * self.batch_size + row
        ids = np.full(offsets.shape, PADDING, np.int64)
        real = offsets < self.examples
        for epoch in np.unique(epochs):
            chosen = real & (epochs == epoch)
            ids[chosen] = self._permute(offsets[chosen], int(epoch))
        return ids, epochs

    def _permute(self, offsets: np.ndarray, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return offsets
        return epoch_order(self.examples, self.seed, epoch)[offsets]
