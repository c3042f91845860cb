# SPDX-License-Identifier: Apache-2.0
"""Loaders for streams: data that is filtered, packed or has no random access."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from . import nested
from . import transforms as transforms_lib
from .foreign import as_transforms
from .loader import MASK, Block
from .nested import Tree
from .order import PADDING, Marks
from .sources import ArraySpec
from .stream_pipeline import Pipeline
from .stream_reader import Reader, hash_rows, reader_part, stack

Rows = slice | np.ndarray
ALL = slice(None)


class _Loader:
    """Base class of the loaders for training and evaluation."""

    def __init__(self, pipeline: Pipeline, transforms: Sequence[Any], rows: int, seed: int):
        if rows < 1:
            raise ValueError(f'batch_size: {rows} examples; expected a positive number')
        self._pipeline = pipeline
        self._transforms = as_transforms(transforms)
        self._rows = rows
        self._seed = seed
        self._first: Tree | None = None
        self._reader: Reader | None = None
        self._position = 0

    @property
    def vocabulary(self) -> str | None:
        """See `trainer.input.loader.HasVocabulary`."""
        return getattr(self._pipeline.source, 'vocabulary', None)

    @property
    def first(self) -> Tree:
        """The first example of the whole stream, each field as (1, ...)."""
        if self._first is None:
            # A reader of its own, over the whole stream: the position does not move, and all
            # processes get the same example.
            reader = Reader(self._pipeline)
            try:
                self._first = self._batch([reader.next_repeating()], np.zeros(1, np.int64))
            finally:
                reader.close()
        return self._first

    @property
    def spec(self) -> Tree:
        """Shape (batch dimension first) and dtype of each array of a global batch."""
        return nested.map_arrays(
            lambda x: ArraySpec((self._rows, *x.shape[1:]), x.dtype), self.first
        )

    def close(self) -> None:
        """Ends threads and processes, and moves the stream back to its beginning."""
        reader, self._reader, self._position = self._reader, None, 0
        if reader is not None:
            reader.close()

    def _go_to(self, start: int, local_rows: np.ndarray) -> Reader:
        """Returns the reader at batch `start`, which is the next one, or 0 for a restart."""
        # The mesh decides which rows a process reads, so the part is known only at the first block.
        part = reader_part(local_rows, self._rows)
        other_rows = self._reader is not None and self._reader.part != part
        # 0 begins again, as every evaluation does. Anything else must be the next batch.
        if start == 0 and (self._position or other_rows):
            self.close()
        elif start != self._position or other_rows:
            raise RuntimeError(
                f'a stream is read in order: expected a request for batch {self._position}, got '
                f'{start}'
            )
        self._reader = self._reader or Reader(self._pipeline, part)
        return self._reader

    def _batch(self, examples: list[Tree], positions: np.ndarray) -> Tree:
        """Returns the stacked and transformed examples; their positions seed random transforms."""
        return transforms_lib.apply(
            self._transforms,
            stack(examples),
            seed=self._seed,
            epochs=np.zeros_like(positions),
            ids=positions,
        )


class StreamLoader(_Loader):
    """Training batches of a stream, pass after pass, with no end.

    A batch is not a function of its position alone, so checkpoints include the state of the stream.
    Each process reads its own part, so a run resumes exactly only with the same number of
    processes.

    Attributes:
        batch_size: rows of a global batch.
        examples: None, because the length of a stream is unknown.
        steps_per_epoch: None, for the same reason.
        marks: see `trainer.input.loader.Resizable.marks`.
    """

    examples = None
    steps_per_epoch = None
    marks: Marks = ()

    def __init__(
        self,
        *,
        source: Any,
        batch_size: int,
        transforms: Sequence[Callable[..., Tree]] = (),
        stages: Sequence[Callable[[Any], Any]] = (),
        seed: int = 0,
        shuffle: bool = True,
        remainder: str = 'carry',
        repeat_batch: int | None = None,
        threads: int = 8,
        workers: int = 0,
    ):
        """Creates the loader; nothing is read before it is needed.

        Args:
            source: the data, see `trainer.data.stream_pipeline.Pipeline`.
            batch_size: rows of a global batch.
            transforms: applied to every batch, see `trainer.data.transforms`.
            stages: applied to the examples before batching, see `trainer.data.stages`.
            seed: seed of the order and of random transforms.
            shuffle: whether to shuffle in each pass, if the source has random access.
            remainder: 'carry': a stream has no last batch that could be padded or dropped.
            repeat_batch: use only this many batches from the start, over and over.
            threads: number of threads that read ahead.
            workers: number of processes that read and run the stages; 0 for none.

        Raises:
            ValueError: if an argument is out of range.
        """
        if remainder != 'carry':
            raise ValueError(f"remainder: {remainder!r}; a stream has no last batch: use 'carry'")
        if repeat_batch is not None and repeat_batch < 1:
            raise ValueError(f'repeat_batch: {repeat_batch} batches; expected at least 1, or None')
        pipeline = Pipeline(
            source=source,
            stages=tuple(stages),
            seed=seed,
            shuffle=shuffle,
            threads=threads,
            workers=workers,
        )
        super().__init__(pipeline, transforms, batch_size, seed)
        self.batch_size = batch_size
        self._repeat = repeat_batch
        self._repeated: Block | None = None
        # Added to `position * batch_size` to get the number of examples consumed before, if the
        # batch size has changed.
        self._shift = 0

    def after(self, batch_sizes: Sequence[tuple[int, int]]) -> StreamLoader:
        """Returns the loader of a run whose batch size has changed; `restore` sets its position.

        Args:
            batch_sizes: (first step, batch size) of each part of the run, from step 0 on; the last
                one is that of this loader.
        """
        loader = copy.copy(self)
        # Not shared with this loader, whose threads it would use.
        loader._reader, loader._position = None, 0
        examples, marks = 0, [(Fraction(0), Fraction(0))]
        for (start, size), (stop, _) in itertools.pairwise(batch_sizes):
            examples += (stop - start) * size
            marks.append((Fraction(stop), Fraction(examples, self.batch_size)))
        loader.marks = tuple(marks) if len(marks) > 1 else ()
        if self._repeat is None:
            loader._shift = examples - batch_sizes[-1][0] * self.batch_size
        return loader

    def block(self, start: int, count: int, rows: Rows = ALL) -> Block:
        """Returns the batches of the steps [start, start + count), in order or from 0.

        Args:
            start: position of the first batch.
            count: number of batches.
            rows: which rows of each global batch; all by default.

        Raises:
            ValueError: if these rows are not an equal part of a batch, or a pass has no example.
            RuntimeError: if the stream is at another position.
        """
        local_rows = np.arange(self._rows)[rows]
        if self._repeat is None:
            return self._next(self._go_to(start, local_rows), count, local_rows)
        # Kept in memory: a stream would have to be read from its beginning for each repetition.
        if self._repeated is None:
            self._repeated = self._next(self._go_to(0, local_rows), self._repeat, local_rows)
            self.close()
        # No states: repeated batches do not depend on the position of the stream.
        again = np.arange(start, start + count) % self._repeat
        arrays = nested.map_arrays(lambda x: x[again], self._repeated.arrays)
        return Block(arrays, self._repeated.ids[again])

    def restore(self, position: int, state: Any) -> None:
        """Moves to a position.

        Args:
            position: position of the next batch.
            state: the entry of `Block.states` for the batch before it; None for the beginning of
                the stream.

        Raises:
            ValueError: if the state belongs to another pipeline.
        """
        self.close()
        # After `close`, which resets it.
        self._position = position
        if state is not None:
            self._reader = Reader.from_state(state, self._pipeline)

    def _next(self, reader: Reader, count: int, local_rows: np.ndarray) -> Block:
        batches, states = [], []
        for _ in range(count):
            examples = [reader.next_repeating() for _ in local_rows]
            first = self._position * self._rows + self._shift
            batches.append(self._batch(examples, first + local_rows))
            # After each batch and not once per block: a checkpoint may be saved at any of these
            # steps.
            states.append(reader.state())
            self._position += 1
        arrays = nested.map_arrays(lambda *xs: np.stack(xs), *batches)
        return Block(arrays, np.stack([hash_rows(batch) for batch in batches]), states)


class StreamEvalLoader(_Loader):
    """Every example of a stream once, in batches of equal shape, until no process has any left.

    The number of examples need not be known. Each process reads its part; after the end of it, its
    batches are padding (the first example of the stream, with `_mask` false) until all processes
    are at the end.

    Attributes:
        examples: None, because the length of a stream is unknown.
        num_batches: None, for the same reason.
        rows: rows of a global batch.
    """

    examples = None
    num_batches = None

    def __init__(
        self,
        *,
        source: Any,
        batch_size: int,
        transforms: Sequence[Callable[..., Tree]] = (),
        stages: Sequence[Callable[[Any], Any]] = (),
        padded_to: int | None = None,
        threads: int = 8,
        workers: int = 0,
    ):
        """Creates the loader; nothing is read before it is needed.

        Args:
            source: the data, see `trainer.data.stream_pipeline.Pipeline`.
            batch_size: examples per batch.
            transforms: applied to every batch; random numbers depend on the position of an example.
            stages: applied to the examples before batching, see `trainer.data.stages`.
            padded_to: rows per batch including padding, so that they divide evenly over devices.
            threads: number of threads that read ahead.
            workers: number of processes that read and run the stages; 0 for none.

        Raises:
            ValueError: if an argument is out of range.
        """
        pipeline = Pipeline(source=source, stages=tuple(stages), threads=threads, workers=workers)
        super().__init__(pipeline, transforms, max(batch_size, padded_to or 0), seed=0)
        self.rows = self._rows

    @property
    def spec(self) -> Tree:
        """Shape (batch dimension first) and dtype of each array of a global batch."""
        spec = super().spec
        # A tuple has no place for a mask: there it follows from the ids.
        if not isinstance(spec, dict):
            return spec
        return {**spec, MASK: ArraySpec((self._rows,), np.dtype(bool))}

    def block(self, start: int, count: int, rows: Rows = ALL) -> Block:
        """Returns the batches [start, start + count), `_mask` among the arrays.

        Args:
            start: number of the first batch: the next one, or 0.
            count: number of batches.
            rows: which rows of each global batch; all by default.

        Raises:
            ValueError: if these rows are not an equal part of a batch.
            RuntimeError: if the stream is at another position.
        """
        local_rows = np.arange(self._rows)[rows]
        reader = self._go_to(start, local_rows)
        batches = []
        for _ in range(count):
            batches.append(self._next(reader, local_rows))
            self._position += 1
        arrays = nested.map_arrays(lambda *xs: np.stack(xs), *[batch for batch, _ in batches])
        return Block(arrays, np.stack([ids for _, ids in batches]))

    def _next(self, reader: Reader, local_rows: np.ndarray) -> tuple[Tree, np.ndarray]:
        # Not `next_repeating`: an evaluation ends after one pass.
        examples = [x for x in (reader.next() for _ in local_rows) if x is not None]
        num_real = len(examples)
        ids = np.full(len(local_rows), PADDING)
        batch = nested.map_arrays(
            lambda x: np.repeat(x, len(local_rows) - num_real, axis=0), self.first
        )
        if examples:
            read = self._batch(examples, self._position * self._rows + local_rows[:num_real])
            ids[:num_real] = hash_rows(read)
            # Concatenated, not assigned into the padding: the text of the first example may be
            # shorter, and numpy would truncate.
            batch = nested.map_arrays(lambda *xs: np.concatenate(xs), read, batch)
        return ({**batch, MASK: ids != PADDING} if isinstance(batch, dict) else batch), ids
