# SPDX-License-Identifier: Apache-2.0
"""Loaders: batches of a source as numpy arrays, many steps in one gather."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from . import transforms as transforms_lib
from .order import PADDING, Marks, Order, after
from .record_errors import blame
from .sources import Arrays, ArraySpec, Source, check_rows, check_source

# Marks the real rows of a batch that may be padded: bool, (batch,).
MASK = '_mask'


@dataclasses.dataclass(frozen=True)
class Block:
    """The batches of consecutive steps.

    Attributes:
        arrays: each field as (steps, rows, ...).
        ids: int64 (steps, rows), the example in each row; -1 is padding.
        states: of a loader whose place is not its position alone, the place behind each batch, as
            JSON values.
    """

    arrays: Arrays
    ids: np.ndarray
    states: list[Any] | None = None


class TrainLoader:
    """Training batches as a pure function of their position.

    A row of padding (`remainder='pad'`) holds the example of its batch's first row, and `_mask` is
    false there. Not zeros: dividing by the norm of such a row gives NaN, and 0 x NaN is not 0.

    Attributes:
        batch_size: rows of a global batch.
        steps_per_epoch: a fraction only where batches run across epoch borders.
        marks: for a run whose batch size has changed, what it had consumed by which step.
    """

    marks: Marks = ()

    def __init__(
        self,
        *,
        source: Source,
        batch_size: int,
        transforms: Sequence[Callable[..., Arrays]] = (),
        seed: int = 0,
        shuffle: bool = True,
        remainder: str = 'carry',
        repeat_batch: int | None = None,
    ):
        """Makes a loader.

        Args:
            source: where examples come from.
            batch_size: rows of a global batch.
            transforms: run over every block, see `trainer.data.transforms`.
            seed: of the order and of random transforms.
            shuffle: a new order in each epoch, or the source's.
            remainder: 'carry', 'pad' or 'drop': see `trainer.data.order.Order`.
            repeat_batch: use only the first so many batches, over and over, to see a model overfit.

        Raises:
            ValueError: if there is not a single batch, the source does not keep to what a `Source`
                is, or an argument is out of its range.
        """
        if repeat_batch is not None and repeat_batch < 1:
            raise ValueError(f'repeat_batch: {repeat_batch} batches; expected at least 1, or None')
        check_source(source)
        if not len(source):
            raise ValueError(
                f'the source {type(source).__name__} is empty; name a split or files that have '
                'examples'
            )
        self.batch_size = batch_size
        self._source = source
        self._transforms = tuple(transforms)
        self._seed = seed
        self._repeat = repeat_batch
        self._order = Order(
            examples=len(source),
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            remainder=remainder,
        )
        self.steps_per_epoch: Fraction = self._order.steps_per_epoch

    @property
    def examples(self) -> int:
        """Number of examples of the source."""
        return len(self._source)

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape (batch dimension first) and dtype of each array of a global batch."""
        block = self.block(self._order.since.step, 1, rows=slice(0, 1))
        return _spec(block, self.batch_size)

    @property
    def first(self) -> Arrays:
        """The first example of the source, as in epoch 0, each field as (1, ...)."""
        first = np.zeros((1, 1), np.int64)
        arrays = _read(self._source, self._transforms, self._seed, first, first, first[0])
        return {name: x[0] for name, x in arrays.items()}

    def after(self, batch_sizes: Sequence[tuple[int, int]]) -> TrainLoader:
        """Returns the loader of a run whose batch size has changed.

        It continues after the examples that were consumed before; positions remain steps.

        Args:
            batch_sizes: (first step, batch size) of each part of the run, from step 0 on; the last
                one is that of this loader.
        """
        loader = copy.copy(self)
        order, loader.marks = after(self._order, batch_sizes)
        if self._repeat is None:  # Otherwise the repeated batches are still the first ones.
            loader._order = order
        return loader

    def order(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the example in each row, and its epoch, both int64 (count, batch_size).

        Args:
            start: position of the first batch.
            count: number of batches.
        """
        if self._repeat is None:
            return self._order.rows(start, count)
        ids, epochs = self._order.rows(0, self._repeat)
        again = np.arange(start, start + count) % self._repeat
        return ids[again], epochs[again]

    def block(self, start: int, count: int, rows: slice | np.ndarray = slice(None)) -> Block:
        """Returns the batches of the steps [start, start + count).

        Args:
            start: position of the first batch.
            count: number of batches.
            rows: which rows of each global batch; all by default.
        """
        ids, epochs = self.order(start, count)
        first, ids, epochs = ids[:, 0], ids[:, rows], epochs[:, rows]
        arrays = _read(self._source, self._transforms, self._seed, ids, epochs, first)
        if self._order.remainder == 'pad':
            arrays = _masked(arrays, ids)
        return Block(arrays, ids)


class EvalLoader:
    """All examples of a source once, in its order, in batches of one static shape.

    A row of padding holds the example of its batch's first row, as in training, and `_mask` is
    false there.

    Attributes:
        examples: number of examples.
        num_batches: number of batches, the last one padded.
        rows: number of rows of a batch, padding included.
    """

    def __init__(
        self,
        *,
        source: Source,
        batch_size: int,
        transforms: Sequence[Callable[..., Arrays]] = (),
        padded_to: int | None = None,
    ):
        """Makes a loader.

        Args:
            source: where examples come from.
            batch_size: examples in a batch.
            transforms: run over every block; random ones draw what they draw in epoch 0.
            padded_to: rows of a batch, at least `batch_size`, so that they divide over devices.

        Raises:
            ValueError: if the batch size is not positive, or the source does not keep to what a
                `Source` is.
        """
        if batch_size < 1:
            raise ValueError(f'batch_size: {batch_size} examples; expected a positive number')
        check_source(source)
        self.examples = len(source)
        self.num_batches = -(-self.examples // batch_size)
        self._source = source
        self._batch_size = batch_size
        self.rows = max(batch_size, padded_to or 0)
        self._transforms = tuple(transforms)

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape (batch dimension first) and dtype of each array of a batch."""
        return _spec(self.block(0, 1), self.rows)

    def block(self, start: int, count: int, rows: slice | np.ndarray = slice(None)) -> Block:
        """Returns the batches [start, start + count), `_mask` among the arrays.

        Args:
            start: number of the first batch.
            count: number of batches.
            rows: which rows of each global batch; all by default.
        """
        first = np.arange(start, start + count)[:, None] * self._batch_size
        row = np.arange(self.rows)[None, :]
        ids = first + row
        ids = np.where((row < self._batch_size) & (ids < self.examples), ids, PADDING)
        # Behind the last batch there is no first row; any example does.
        filler, ids = np.maximum(ids[:, 0], 0), ids[:, rows]
        epochs = np.zeros_like(ids)
        arrays = _read(self._source, self._transforms, 0, ids, epochs, filler)
        return Block(_masked(arrays, ids), ids)


def _read(
    source: Source,
    transforms: Any,
    seed: int,
    ids: np.ndarray,
    epochs: np.ndarray,
    filler: np.ndarray,
) -> Arrays:
    """One gather and one pass of transforms over the real rows.

    Args:
        source: where examples come from.
        transforms: run over the rows.
        seed: of random transforms.
        ids: int64 (steps, rows).
        epochs: int64 (steps, rows).
        filler: int64 (steps,), the example that stands in the rows of padding.
    """
    real = ids != PADDING
    if real.all():
        batch = _transformed(source, transforms, seed, ids.ravel(), epochs.ravel())
        return {name: x.reshape(*ids.shape, *x.shape[1:]) for name, x in batch.items()}
    padded = np.flatnonzero(~real.all(axis=1))
    wanted = np.concatenate([ids[real], filler[padded]])
    when = np.concatenate([epochs[real], epochs[padded, 0]])
    # Read once for each padded step, and repeated to the number of its rows of padding.
    repeats = (~real).sum(axis=1)[padded]
    arrays = {}
    for name, x in _transformed(source, transforms, seed, wanted, when).items():
        rows, fill = x[: -len(padded)], x[-len(padded) :]
        arrays[name] = np.empty((*ids.shape, *x.shape[1:]), x.dtype)
        arrays[name][real] = rows
        arrays[name][~real] = np.repeat(fill, repeats, axis=0)
    return arrays


def _transformed(
    source: Source, transforms: Any, seed: int, ids: np.ndarray, epochs: np.ndarray
) -> Arrays:
    def read(rows: slice) -> Arrays:
        some = ids[rows]
        arrays = source.gather(some)
        check_rows(source, arrays, len(some))
        return transforms_lib.apply(transforms, arrays, seed=seed, epochs=epochs[rows], ids=some)

    try:
        return read(slice(None))
    except Exception as error:
        error.add_note(blame(source, ids, read))
        raise


def _masked(arrays: Arrays, ids: np.ndarray) -> Arrays:
    if MASK in arrays:
        raise ValueError(
            f'a field of the batch is named {MASK!r}, as is the mask of padded rows; rename it '
            'with trainer.data.transforms:Rename'
        )
    return {**arrays, MASK: ids != PADDING}


def _spec(block: Block, rows: int) -> dict[str, ArraySpec]:
    return {name: ArraySpec((rows, *x.shape[2:]), x.dtype) for name, x in block.arrays.items()}
