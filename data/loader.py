# SPDX-License-Identifier: Apache-2.0
"""The default loaders: batches of a random-access source, many steps in one gather."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np

from . import nested
from . import transforms as transforms_lib
from .collate import Collator, is_collating, padding_rows
from .foreign import as_transforms
from .nested import Tree
from .order import PADDING, Marks, Order, replay_batch_sizes
from .record_errors import blame
from .sources import ArraySpec, Source, check_rows, check_source

# Name of the mask in batches that may be padded: bool, (batch,), False for padding.
MASK = '_mask'


@dataclasses.dataclass(frozen=True)
class Block:
    """The batches of consecutive steps.

    Attributes:
        arrays: each field as (steps, rows, ...); a dict, or another tree (`data.nested`). Of a
            source that collates, whole batches, (steps, ...).
        ids: int64 (steps, rows), the example in each row; -1 is padding.
        states: for a stream, its state after each batch, as JSON values; None for other loaders.
    """

    arrays: Tree
    ids: np.ndarray
    states: list[Any] | None = None


class TrainLoader:
    """Training batches as a pure function of their position.

    A row of padding (`remainder='pad'`) holds the example of its batch's first row, and `_mask` is
    false there. Not zeros: dividing by the norm of a zero row gives NaN, and the
    mask cannot remove it (0 x NaN is NaN).

    Attributes:
        batch_size: rows of a global batch.
        steps_per_epoch: a fraction only where batches run across epoch borders.
        marks: see `trainer.input.loader.Resizable.marks`.
    """

    marks: Marks = ()

    def __init__(
        self,
        *,
        source: Source,
        batch_size: int,
        transforms: Sequence[Callable[..., Tree]] = (),
        seed: int = 0,
        shuffle: bool = True,
        remainder: str = 'carry',
        repeat_batch: int | None = None,
    ):
        """Creates the loader.

        Args:
            source: source of the examples.
            batch_size: rows of a global batch.
            transforms: applied to every block, see `trainer.data.transforms`.
            seed: seed of the order and of random transforms.
            shuffle: True for a new order in each epoch, False for the order of the source.
            remainder: 'carry', 'pad' or 'drop': see `trainer.data.order.Order`.
            repeat_batch: use only this many batches from the start, over and over (to check that a
                model can overfit).

        Raises:
            ValueError: if there is no batch, the source violates the `Source` protocol, or an
                argument is out of range.
        """
        if repeat_batch is not None and repeat_batch < 1:
            raise ValueError(f'repeat_batch: {repeat_batch} batches; expected at least 1, or None')
        self._transforms = as_transforms(transforms)
        rows = batch_size + padding_rows(source)
        self._collator = _make_collator(source, self._transforms, seed, rows)
        if not len(source):
            raise ValueError(
                f'the source {type(source).__name__} is empty; name a split or files that have '
                'examples'
            )
        self.batch_size = batch_size
        self._source = source
        self._seed = seed
        self._repeat = repeat_batch
        self._order = Order(
            examples=len(source),
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            remainder=remainder,
            arrange=None if self._collator is None else getattr(source, 'arrange', None),
        )
        self.steps_per_epoch: Fraction = self._order.steps_per_epoch

    @property
    def examples(self) -> int:
        """Number of examples of the source."""
        return len(self._source)

    @property
    def rows(self) -> int:
        """Number of rows of a batch: more than `batch_size` for a source with `padding_rows`."""
        return self.batch_size if self._collator is None else self._collator.rows

    @property
    def num_shapes(self) -> int | None:
        """See `trainer.input.loader.Collated`."""
        return None if self._collator is None else self._collator.num_shapes

    @property
    def spec(self) -> Tree:
        """Shape (batch dimension first) and dtype of each array of a global batch."""
        # The first batch that exists: an order does not support steps before its last change of the
        # batch size.
        start = self._order.resized_at.step
        if self._collator is not None:
            return _spec_of_whole(self.block(start, 1))
        return _spec(self.block(start, 1, rows=slice(0, 1)), self.batch_size)

    @property
    def vocabulary(self) -> str | None:
        """See `trainer.input.loader.HasVocabulary`."""
        return getattr(self._source, 'vocabulary', None)

    @property
    def first(self) -> Tree:
        """The first example of the source, as in epoch 0, each field as (1, ...).

        Of a source that collates, a batch with this example alone.
        """
        if self._collator is not None:
            return self._collator.first()
        first = np.zeros((1, 1), np.int64)
        arrays = _read(self._source, self._transforms, self._seed, first, first, first[0])
        return nested.map_arrays(lambda x: x[0], arrays)

    def after(self, batch_sizes: Sequence[tuple[int, int]]) -> TrainLoader:
        """Returns the loader of a run whose batch size has changed.

        It continues after the examples that were consumed before; positions remain steps.

        Args:
            batch_sizes: (first step, batch size) of each part of the run, from step 0 on; the last
                one is that of this loader.
        """
        loader = copy.copy(self)
        order, loader.marks = replay_batch_sizes(self._order, batch_sizes)
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
        # Always the first batches, whatever the position.
        ids, epochs = self._order.rows(0, self._repeat)
        again = np.arange(start, start + count) % self._repeat
        return ids[again], epochs[again]

    def block(self, start: int, count: int, rows: slice | np.ndarray = slice(None)) -> Block:
        """Returns the batches of the steps [start, start + count).

        Args:
            start: position of the first batch.
            count: number of batches.
            rows: which rows of each global batch; all by default. Batches of a source that
                collates are always whole.
        """
        ids, epochs = self.order(start, count)
        if self._collator is not None:
            return _collate(self._collator, ids, epochs)
        # The filler is taken from the whole batch: each process reads only some rows, but padding
        # must not depend on which.
        first, ids, epochs = ids[:, 0], ids[:, rows], epochs[:, rows]
        arrays = _read(self._source, self._transforms, self._seed, ids, epochs, first)
        if self._order.remainder == 'pad':
            arrays = _with_mask(arrays, ids)
        return Block(arrays, ids)


class EvalLoader:
    """All examples of a source once, in its order, in batches of equal shape.

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
        transforms: Sequence[Callable[..., Tree]] = (),
        padded_to: int | None = None,
        threads: int = 1,
    ):
        """Creates the loader.

        Args:
            source: source of the examples.
            batch_size: examples per batch.
            transforms: applied to every block; random ones use the random numbers of epoch 0.
            padded_to: rows per batch including padding, so that they divide evenly over devices.
            threads: number of threads that read and transform parts of the rows, where this is
                slow and releases the interpreter lock, such as decoding images.

        Raises:
            ValueError: if a number is not positive, the source violates the `Source` protocol, or
                it collates its batches and there is more than one thread.
        """
        if batch_size < 1:
            raise ValueError(f'batch_size: {batch_size} examples; expected a positive number')
        if threads < 1 or (threads > 1 and is_collating(source)):
            raise ValueError(
                f'threads: {threads}; expected a positive number, and 1 for a source that collates '
                'its batches'
            )
        self._transforms = as_transforms(transforms)
        self.rows = max(batch_size + padding_rows(source), padded_to or 0)
        self._collator = _make_collator(source, self._transforms, 0, self.rows)
        self.examples = len(source)
        self.num_batches = -(-self.examples // batch_size)
        self._source = source
        self._batch_size = batch_size
        self._threads = threads

    @property
    def num_shapes(self) -> int | None:
        """See `trainer.input.loader.Collated`."""
        return None if self._collator is None else self._collator.num_shapes

    @property
    def vocabulary(self) -> str | None:
        """See `trainer.input.loader.HasVocabulary`."""
        return getattr(self._source, 'vocabulary', None)

    @property
    def spec(self) -> Tree:
        """Shape (batch dimension first) and dtype of each array of a batch."""
        block = self.block(0, 1)
        return _spec(block, self.rows) if self._collator is None else _spec_of_whole(block)

    def block(self, start: int, count: int, rows: slice | np.ndarray = slice(None)) -> Block:
        """Returns the batches [start, start + count), `_mask` among the arrays.

        Args:
            start: number of the first batch.
            count: number of batches.
            rows: which rows of each global batch; all by default. Batches of a source that
                collates are always whole.
        """
        first = np.arange(start, start + count)[:, None] * self._batch_size
        row = np.arange(self.rows)[None, :]
        ids = first + row
        # Rows beyond the batch size exist only so that the batch divides evenly over the devices.
        ids = np.where((row < self._batch_size) & (ids < self.examples), ids, PADDING)
        if self._collator is not None:
            return _collate(self._collator, ids, np.zeros_like(ids))
        # Batches after the last one have no first row: any example can fill them.
        filler, ids = np.maximum(ids[:, 0], 0), ids[:, rows]
        epochs = np.zeros_like(ids)
        arrays = _read(self._source, self._transforms, 0, ids, epochs, filler, self._threads)
        return Block(_with_mask(arrays, ids), ids)


def _make_collator(source: Any, transforms: Any, seed: int, rows: int) -> Collator | None:
    """Checks a source; returns what makes its batches, None for rows of its `gather`."""
    if not is_collating(source):
        check_source(source)
        return None
    return Collator(source, transforms, seed, rows)


def _collate(collator: Collator, ids: np.ndarray, epochs: np.ndarray) -> Block:
    batches, ids = collator.batches(ids, epochs)
    return Block(_with_mask(batches, ids), ids)


def _read(
    source: Source,
    transforms: Any,
    seed: int,
    ids: np.ndarray,
    epochs: np.ndarray,
    filler: np.ndarray,
    threads: int = 1,
) -> Tree:
    """Reads and transforms all rows with one gather a thread; fills the rows of padding.

    Args:
        source: source of the examples.
        transforms: applied to the rows.
        seed: seed of random transforms.
        ids: int64 (steps, rows).
        epochs: int64 (steps, rows).
        filler: int64 (steps,), the example that fills the rows of padding.
        threads: number of threads; with 1, this one does all.
    """
    real = ids != PADDING
    if real.all():
        flat = ids.ravel(), epochs.ravel()
        batch = _gather_and_transform(source, transforms, seed, *flat, threads)
        return nested.map_arrays(lambda x: x.reshape(*ids.shape, *x.shape[1:]), batch)
    # One gather for everything: the real rows, and at its end one filler for each step with
    # padding.
    padded = np.flatnonzero(~real.all(axis=1))
    wanted = np.concatenate([ids[real], filler[padded]])
    wanted_epochs = np.concatenate([epochs[real], epochs[padded, 0]])
    # The filler is read once per padded step, and repeated for each of its rows of padding.
    repeats = (~real).sum(axis=1)[padded]

    def pad(x: np.ndarray) -> np.ndarray:
        rows, fill = x[: -len(padded)], x[-len(padded) :]
        whole = np.empty((*ids.shape, *x.shape[1:]), x.dtype)
        whole[real] = rows
        whole[~real] = np.repeat(fill, repeats, axis=0)
        return whole

    batch = _gather_and_transform(source, transforms, seed, wanted, wanted_epochs, threads)
    return nested.map_arrays(pad, batch)


def _gather_and_transform(
    source: Source, transforms: Any, seed: int, ids: np.ndarray, epochs: np.ndarray, threads: int
) -> Tree:
    def read(rows: slice) -> Tree:
        selected = ids[rows]
        arrays = source.gather(selected)
        # Each time, not just once: a wrong number of rows would silently pair fields of different
        # examples.
        check_rows(source, arrays, len(selected))
        return transforms_lib.apply(
            transforms, arrays, seed=seed, epochs=epochs[rows], ids=selected
        )

    try:
        return read(slice(None)) if threads == 1 else _read_in_threads(read, len(ids), threads)
    except Exception as error:
        # A note, so that the error keeps its type and its traceback.
        error.add_note(blame(source, ids, read))
        raise


def _read_in_threads(read: Callable[[slice], Tree], count: int, threads: int) -> Tree:
    """Returns the batch of `count` rows, of which each thread reads a part."""
    size = -(-count // threads)
    parts = [slice(start, start + size) for start in range(0, count, size)]
    with ThreadPoolExecutor(threads) as pool:
        batches = list(pool.map(read, parts))
    return nested.map_arrays(lambda *arrays: np.concatenate(arrays), *batches)


def _with_mask(arrays: Tree, ids: np.ndarray) -> Tree:
    # A tuple has no place for it: there the mask follows from the ids.
    if not isinstance(arrays, dict):
        return arrays
    if MASK in arrays:
        raise ValueError(
            f'field name {MASK!r} is reserved for the mask of padded rows; rename the field '
            'with trainer.data.transforms:Rename'
        )
    return {**arrays, MASK: ids != PADDING}


def _spec_of_whole(block: Block) -> Tree:
    return nested.map_arrays(lambda x: ArraySpec(x.shape[1:], x.dtype), block.arrays)


def _spec(block: Block, rows: int) -> Tree:
    return nested.map_arrays(lambda x: ArraySpec((rows, *x.shape[2:]), x.dtype), block.arrays)
