# SPDX-License-Identifier: Apache-2.0
"""The global order of examples, as a pure function of seed and position."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

PADDING = -1

# Pairs (step, data that a run had consumed by then, in batches of its current size), ascending.
Marks = tuple[tuple[Fraction, Fraction], ...]


def mix(x: np.ndarray) -> np.ndarray:
    """Returns uint64 values scrambled by the finaliser of splitmix64 (Steele et al., 2014)."""
    with np.errstate(over='ignore'):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def combine(*parts: np.ndarray | int) -> np.ndarray:
    """Returns one scrambled uint64 of several integers (arrays broadcast), order-sensitive."""
    # The constants must never change: orders of earlier runs have to be reproduced when these
    # resume.
    key = np.zeros((), np.uint64)
    with np.errstate(over='ignore'):
        for part in parts:
            word = np.asarray(part).astype(np.uint64)
            key = mix(key * np.uint64(0x9E3779B97F4A7C15) + word + np.uint64(0x9E3779B97F4A7C15))
    return key


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a permutation of range(examples), int64.

    Sorted hashes and not numpy's shuffle: numpy may change its streams between versions, and a
    changed order would silently break resumed runs. The hash is one-to-one for a seed and an
    epoch, so there are no ties, and any kind of sort gives the same order.
    """
    return np.argsort(combine(seed, epoch, np.arange(examples)))


@dataclasses.dataclass(frozen=True)
class ResizePoint:
    """The position at which a run last resumed with another batch size.

    Attributes:
        step: the first step with the new size.
        epoch: the current epoch.
        done: number of examples of that epoch that were already consumed.
        epochs: number of epochs consumed, with the current one measured in steps.
    """

    step: int = 0
    epoch: int = 0
    done: int = 0
    epochs: Fraction = Fraction(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """Maps each row of each training batch to an example.

    Attributes:
        examples: length of the source.
        batch_size: rows of a global batch.
        seed: seed of the shuffle.
        shuffle: whether to shuffle; False keeps the order of the source in every epoch.
        remainder: 'carry' lets batches cross epoch borders, 'pad' fills the last batch of an epoch
            with padding, 'drop' leaves it out.
        resized_at: where batches of this size begin; steps before it are not supported.
        arrange: rearranges the shuffled examples of an epoch: see
            `trainer.data.collate.CollatingSource`.
    """

    examples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    remainder: str = 'carry'
    resized_at: ResizePoint = ResizePoint()
    arrange: Callable[[np.ndarray, int, int], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.remainder not in ('carry', 'pad', 'drop'):
            raise ValueError(
                f"remainder: expected 'carry', 'pad' or 'drop', got {self.remainder!r}"
            )
        if self.examples < 1 or self.batch_size < 1:
            raise ValueError(
                f'{self.examples} examples in batches of {self.batch_size}: both must be positive'
            )
        if self.remainder == 'drop' and self.examples < self.batch_size:
            raise ValueError(
                f"remainder='drop' leaves no batch: {self.examples} examples in batches of "
                f"{self.batch_size}; use 'carry' or 'pad'"
            )

    @property
    def steps_per_epoch(self) -> Fraction:
        """Batches in an epoch; a fraction only where batches run across epoch borders."""
        return Fraction(self._rows_per_epoch, self.batch_size)

    def rows(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids, epochs), both int64 (count, batch_size), of the steps [start, start+count).

        An id of -1 is padding.
        """
        # All rows of a run form one sequence, epoch after epoch; a batch is a piece of it, wherever
        # the borders of epochs are.
        first = start * self.batch_size + self._shift
        last = first + count * self.batch_size
        period = self._rows_per_epoch
        pieces = [
            self._epoch(epoch)[max(first - epoch * period, 0) : last - epoch * period]
            for epoch in range(first // period, -(-last // period))
        ]
        shape = (count, self.batch_size)
        epochs = np.arange(first, last) // period
        return np.concatenate(pieces).reshape(shape), epochs.reshape(shape)

    def resize(self, step: int, batch_size: int) -> Order:
        """Returns the order of a run that resumes at `step` with another batch size.

        The rest of the current epoch comes first, without examples that were already consumed.
        """
        epoch, row = divmod(step * self.batch_size + self._shift, self._rows_per_epoch)
        done = row
        if epoch == self.resized_at.epoch:
            # The second change in the same epoch: examples that were consumed before the first one
            # count too, but not the rows of padding in their place.
            done += self.resized_at.done - (self._rows_per_epoch - self._rows_left)
        resized_at = ResizePoint(step, epoch, done, self.epochs(step))
        return dataclasses.replace(self, batch_size=batch_size, resized_at=resized_at)

    def epochs(self, step: int) -> Fraction:
        """Returns how many epochs a run has consumed by a step; without jumps, unlike its rows."""
        last, left = self.resized_at, self.steps_left
        elapsed = step - last.step
        if elapsed > left:
            return last.epoch + 1 + (elapsed - left) / self.steps_per_epoch
        # The rest of the epoch in which the batch size changed is spread evenly over its steps.
        return last.epochs + (last.epoch + 1 - last.epochs) * (elapsed / left if elapsed else 0)

    @property
    def steps_left(self) -> Fraction:
        """Batches from `resized_at` to the end of the epoch that was current there."""
        return Fraction(self._rows_left, self.batch_size)

    @property
    def _shift(self) -> int:
        """Rows of this run before step 0, if all of its batches had this size."""
        end = (self.resized_at.epoch + 1) * self._rows_per_epoch
        return end - self._rows_left - self.resized_at.step * self.batch_size

    @property
    def _rows_per_epoch(self) -> int:
        return self._rows_of(self.examples)

    @property
    def _rows_left(self) -> int:
        return self._rows_of(self.examples - self.resized_at.done)

    def _rows_of(self, examples: int) -> int:
        if self.remainder == 'carry':
            return examples
        # 'drop' leaves out the incomplete batch, 'pad' fills it.
        whole = examples // self.batch_size * self.batch_size
        return whole + self.batch_size * (self.remainder == 'pad' and whole < examples)

    @functools.cached_property
    def _epoch(self) -> Callable[[int], np.ndarray]:
        """Returns the ids of all rows of an epoch, cached for two: a batch may cross their border.

        Cached per order and not in `epoch_order`: two loaders that alternate must not evict each
        other's epochs.
        """

        def ids(epoch: int) -> np.ndarray:
            if self.shuffle:
                order = epoch_order(self.examples, self.seed, epoch)
                if self.arrange is not None:
                    order = _check_permutation(self.arrange(order, self.seed, epoch), order)
            else:
                order = np.arange(self.examples)
            rows = self._rows_per_epoch
            if epoch == self.resized_at.epoch:
                order, rows = order[self.resized_at.done :], self._rows_left
            missing = max(rows - len(order), 0)
            order = np.concatenate([order, np.full(missing, PADDING)])[:rows]
            # Batches of another size were consumed before; they are not read here.
            before = np.full(self._rows_per_epoch - rows, PADDING)
            return np.concatenate([before, order]) if len(before) else order

        cached, lock = functools.lru_cache(maxsize=2)(ids), threading.Lock()

        def compute_once(epoch: int) -> np.ndarray:
            # If several threads need an epoch at once, one shuffles it and the others wait.
            with lock:
                return cached(epoch)

        return compute_once

    def __getstate__(self) -> dict[str, Any]:
        # The cache and its lock are not sent to other processes.
        return {name: value for name, value in self.__dict__.items() if name != '_epoch'}


def _check_permutation(arranged: np.ndarray, order: np.ndarray) -> np.ndarray:
    if not np.array_equal(np.sort(arranged), np.arange(len(order))):
        raise ValueError(
            'the arrange of the source must return all examples of the order that it gets, each '
            'once'
        )
    return arranged


def replay_batch_sizes(order: Order, batch_sizes: Sequence[tuple[int, int]]) -> tuple[Order, Marks]:
    """Returns the order of a run whose batch size has changed, and its marks.

    Args:
        order: the order without a history of batch sizes.
        batch_sizes: (first step, batch size) of each part of the run, from step 0 on; the last one
            is that of `order`.
    """
    order = dataclasses.replace(order, batch_size=batch_sizes[0][1], resized_at=ResizePoint())
    marks = [(Fraction(0), Fraction(0))]
    for step, batch_size in batch_sizes[1:]:
        order = order.resize(step, batch_size)
        last = order.resized_at
        # The end of an epoch that was expected before the change is no longer at that step.
        marks = [mark for mark in marks if mark[0] <= step]
        marks.append((Fraction(step), last.epochs))
        # Padding or dropping the rest of an epoch changes the number of examples per step, so the
        # end of the epoch gets a mark of its own.
        marks.append((step + order.steps_left, Fraction(last.epoch + 1)))
    if len(batch_sizes) == 1:
        return order, ()
    return order, tuple((step, epochs * order.steps_per_epoch) for step, epochs in marks)
