# SPDX-License-Identifier: Apache-2.0
"""Loaders of streams: data that is filtered, packed or only read from the front."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from . import transforms as transforms_lib
from .loader import MASK, Block
from .order import PADDING, Marks
from .sources import Arrays, ArraySpec
from .stream_pipeline import Pipeline
from .stream_reader import Reader, numbers, part_of, stack

Rows = slice | np.ndarray
ALL = slice(None)


class _Loader:
    """What training and evaluation share: batches of `rows` rows, from a pipeline."""

    def __init__(self, pipeline: Pipeline, transforms: Sequence[Any], rows: int, seed: int):
        if rows < 1:
            raise ValueError(f'batch_size: {rows} examples; expected a positive number')
        self._pipeline = pipeline
        self._transforms = tuple(transforms)
        self._rows = rows
        self._seed = seed
        self._first: Arrays | None = None
        self._reader: Reader | None = None
        self._position = 0

    @property
    def first(self) -> Arrays:
        """The first example of the whole stream, each field as (1, ...)."""
        if self._first is None:
            reader = Reader(self._pipeline)
            try:
                self._first = self._batch([reader.next_of_all()], np.zeros(1, np.int64))
            finally:
                reader.close()
        return self._first

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape (batch dimension first) and dtype of each array of a global batch."""
        shapes = {name: (self._rows, *x.shape[1:]) for name, x in self.first.items()}
        return {name: ArraySpec(shape, self.first[name].dtype) for name, shape in shapes.items()}

    def close(self) -> None:
        """Ends threads and processes; the stream stands at its beginning then."""
        reader, self._reader, self._position = self._reader, None, 0
        if reader is not None:
            reader.close()

    def _go_to(self, start: int, held: np.ndarray) -> Reader:
        """Returns the reader, which stands at `start`; at the beginning it may start anew."""
        part = part_of(held, self._rows)
        moved = self._reader is not None and self._reader.part != part
        if start == 0 and (self._position or moved):
            self.close()
        elif start != self._position or moved:
            raise RuntimeError(
                f'a stream is read in order: it is at batch {self._position}, and was asked '
                f'for batch {start}'
            )
        self._reader = self._reader or Reader(self._pipeline, part)
        return self._reader

    def _batch(self, examples: list[Arrays], places: np.ndarray) -> Arrays:
        """Returns the examples stacked and transformed; chance goes by their places."""
        return transforms_lib.apply(
            self._transforms,
            stack(examples),
            seed=self._seed,
            epochs=np.zeros_like(places),
            ids=places,
        )


class StreamLoader(_Loader):
    """Training batches of a stream, pass after pass, with no end.

    A batch is not a function of its position alone: the position of the stream is saved in the
    checkpoint. Each process reads its own part, so a run resumes exactly only with the same number
    of processes.

    Attributes:
        batch_size: rows of a global batch.
        examples: None, for the length of a stream is not known.
        steps_per_epoch: None, for the same reason.
        marks: for a run whose batch size has changed, what it had consumed by which step.
    """

    examples = None
    steps_per_epoch = None
    marks: Marks = ()

    def __init__(
        self,
        *,
        source: Any,
        batch_size: int,
        transforms: Sequence[Callable[..., Arrays]] = (),
        stages: Sequence[Callable[[Any], Any]] = (),
        seed: int = 0,
        shuffle: bool = True,
        remainder: str = 'carry',
        repeat_batch: int | None = None,
        threads: int = 8,
        workers: int = 0,
    ):
        """Makes a loader; nothing is read before it is asked for something.

        Args:
            source: what is read, see `trainer.data.stream_pipeline.Pipeline`.
            batch_size: rows of a global batch.
            transforms: run over every batch, see `trainer.data.transforms`.
            stages: what examples run through before they are batched, see `trainer.data.stages`.
            seed: of the order and of random transforms.
            shuffle: a new order in each pass, where the source can be read in any order.
            remainder: 'carry': a stream has no last batch that could be padded or dropped.
            repeat_batch: use only the first so many batches, over and over.
            threads: that read ahead.
            workers: processes that read and run the stages; 0 leaves it to this one.

        Raises:
            ValueError: if an argument is out of its range.
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
        self._kept: Block | None = None
        # Examples of this run before position 0, if all of its batches had this size.
        self._shift = 0

    def after(self, batch_sizes: Sequence[tuple[int, int]]) -> StreamLoader:
        """Returns the loader of a run whose batch size has changed; `restore` sets its position.

        Args:
            batch_sizes: (first step, batch size) of each part of the run, from step 0 on; the last
                one is that of this loader.
        """
        loader = copy.copy(self)
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
        """Returns the batches of the steps [start, start + count): the next ones, or the first.

        Args:
            start: position of the first batch.
            count: number of batches.
            rows: which rows of each global batch; all by default.

        Raises:
            ValueError: if these rows are no equal part of a batch, or a pass gives no example.
            RuntimeError: if the stream stands elsewhere.
        """
        held = np.arange(self._rows)[rows]
        if self._repeat is None:
            return self._next(self._go_to(start, held), count, held)
        if self._kept is None:
            self._kept = self._next(self._go_to(0, held), self._repeat, held)
            self.close()
        again = np.arange(start, start + count) % self._repeat
        return Block({k: x[again] for k, x in self._kept.arrays.items()}, self._kept.ids[again])

    def restore(self, position: int, state: Any) -> None:
        """Goes to a place.

        Args:
            position: of the next batch.
            state: what `Block.states` holds of the batch before it; None for the stream's
                beginning.

        Raises:
            ValueError: if it is the place of another pipeline.
        """
        self.close()
        self._position = position
        if state is not None:
            self._reader = Reader.at(state, self._pipeline)

    def _next(self, reader: Reader, count: int, held: np.ndarray) -> Block:
        made, states = [], []
        for _ in range(count):
            examples = [reader.next_of_all() for _ in held]
            place = self._position * self._rows + self._shift
            made.append(self._batch(examples, place + held))
            states.append(reader.state())
            self._position += 1
        arrays = {name: np.stack([batch[name] for batch in made]) for name in made[0]}
        return Block(arrays, np.stack([numbers(batch) for batch in made]), states)


class StreamEvalLoader(_Loader):
    """Every example of a stream once, in batches of one static shape, until nobody has any left.

    The number of examples need not be known. Each of several readers takes its part; behind its end
    it gives padding: the stream's first example, with a false `_mask`, until all are at the end.

    Attributes:
        examples: None, for the length of a stream is not known.
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
        transforms: Sequence[Callable[..., Arrays]] = (),
        stages: Sequence[Callable[[Any], Any]] = (),
        padded_to: int | None = None,
        threads: int = 8,
        workers: int = 0,
    ):
        """Makes a loader; nothing is read before it is asked for something.

        Args:
            source: what is read, see `trainer.data.stream_pipeline.Pipeline`.
            batch_size: examples in a batch.
            transforms: run over every batch; random ones draw by an example's place.
            stages: what examples run through before they are batched, see `trainer.data.stages`.
            padded_to: rows of a batch, at least `batch_size`, so that they divide over devices.
            threads: that read ahead.
            workers: processes that read and run the stages; 0 leaves it to this one.

        Raises:
            ValueError: if an argument is out of its range.
        """
        pipeline = Pipeline(source=source, stages=tuple(stages), threads=threads, workers=workers)
        super().__init__(pipeline, transforms, max(batch_size, padded_to or 0), seed=0)
        self.rows = self._rows

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape (batch dimension first) and dtype of each array of a global batch."""
        return {**super().spec, MASK: ArraySpec((self._rows,), np.dtype(bool))}

    def block(self, start: int, count: int, rows: Rows = ALL) -> Block:
        """Returns the batches [start, start + count), `_mask` among the arrays.

        Args:
            start: number of the first batch: the next one, or 0.
            count: number of batches.
            rows: which rows of each global batch; all by default.

        Raises:
            ValueError: if these rows are no equal part of a batch.
            RuntimeError: if the stream stands elsewhere.
        """
        held = np.arange(self._rows)[rows]
        reader = self._go_to(start, held)
        made = []
        for _ in range(count):
            made.append(self._next(reader, held))
            self._position += 1
        arrays = {name: np.stack([batch[name] for batch, _ in made]) for name in made[0][0]}
        return Block(arrays, np.stack([ids for _, ids in made]))

    def _next(self, reader: Reader, held: np.ndarray) -> tuple[Arrays, np.ndarray]:
        examples = [x for x in (reader.next() for _ in held) if x is not None]
        real = len(examples)
        ids = np.full(len(held), PADDING)
        batch = {name: np.repeat(x, len(held) - real, axis=0) for name, x in self.first.items()}
        if examples:
            read = self._batch(examples, self._position * self._rows + held[:real])
            ids[:real] = numbers(read)
            # Not assigned into copies of the first example: its text may be shorter.
            batch = {name: np.concatenate([x, batch[name]]) for name, x in read.items()}
        return {**batch, MASK: ids != PADDING}, ids
