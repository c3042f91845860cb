# SPDX-License-Identifier: Apache-2.0
"""A training loader for slow sources: threads or worker processes prepare its batches."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from . import nested
from .collate import stack_batches
from .compat import worker_death_cause
from .loader import Block, TrainLoader
from .nested import Tree
from .order import PADDING, Marks
from .record_errors import describe
from .sources import Source
from .workers import WorkerError, prefetch_in_workers, to_portable


class GrainLoader:
    """The batches of `TrainLoader`, read and transformed ahead of time by Grain.

    For records that are read from disk and decoded. For data in memory `TrainLoader` is faster: a
    gather of many rows costs less than passing them between threads or processes.

    A batch is divided into tasks of a few rows, which threads or worker processes take in turn. The
    tasks are a pure function of the position, so batches depend neither on the number of tasks nor
    on the number of workers.

    Attributes:
        batch_size: rows of a global batch.
        steps_per_epoch: a fraction only where batches run across epoch borders.
    """

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
        workers: int = 0,
        threads: int | None = None,
        task_rows: int = 32,
        ahead: int = 2,
    ):
        """Creates the loader; threads and processes start with the first block.

        Args:
            source: source of the examples; with workers it must be picklable.
            batch_size: rows of a global batch.
            transforms: applied to the rows of each task, see `trainer.data.transforms`.
            seed: seed of the order and of random transforms.
            shuffle: True for a new order in each epoch, False for the order of the source.
            remainder: 'carry', 'pad' or 'drop': see `trainer.data.order.Order`.
            repeat_batch: use only this many batches from the start, over and over.
            workers: number of worker processes; 0 for threads of this process, which suffice if
                most of the work releases the interpreter lock (reading files, decoding images).
            threads: threads per process; by default 8 without workers, and 0 in a worker (its main
                thread does the work).
            task_rows: rows that are read and transformed at once; all rows of a batch if the
                source collates.
            ahead: number of batches to prefetch.

        Raises:
            ValueError: as `TrainLoader`, or if a number is out of range.
        """
        least = {'workers': 0, 'threads': 0, 'task_rows': 1, 'ahead': 1}
        given = {'workers': workers, 'threads': threads, 'task_rows': task_rows, 'ahead': ahead}
        for name, value in given.items():
            if value is not None and value < least[name]:
                raise ValueError(f'{name}: {value}; expected at least {least[name]}')
        self._loader = TrainLoader(
            source=source,
            batch_size=batch_size,
            transforms=transforms,
            seed=seed,
            shuffle=shuffle,
            remainder=remainder,
            repeat_batch=repeat_batch,
        )
        self._source = source
        self._workers = workers
        self._threads = threads if threads is not None else 0 if workers else 8
        self._task_rows = task_rows
        self._ahead = ahead
        self._stream: _Stream | None = None
        self.batch_size = batch_size
        self.steps_per_epoch: Fraction = self._loader.steps_per_epoch

    @property
    def examples(self) -> int:
        """Number of examples of the source."""
        return self._loader.examples

    @property
    def rows(self) -> int:
        """Number of rows of a batch: see `TrainLoader.rows`."""
        return self._loader.rows

    @property
    def num_shapes(self) -> int | None:
        """See `trainer.input.loader.Collated`."""
        return self._loader.num_shapes

    @property
    def marks(self) -> Marks:
        """See `trainer.input.loader.Resizable.marks`."""
        return self._loader.marks

    @property
    def vocabulary(self) -> str | None:
        """See `trainer.input.loader.HasVocabulary`."""
        return self._loader.vocabulary

    @property
    def first(self) -> Tree:
        """The first example of the source, as in epoch 0, each field as (1, ...)."""
        return self._loader.first

    def after(self, batch_sizes: Sequence[tuple[int, int]]) -> GrainLoader:
        """Returns the loader of a run whose batch size has changed: see `TrainLoader.after`."""
        # The source is shared: it may have open files, or much data in memory.
        loader = copy.copy(self)
        loader._loader, loader._stream = self._loader.after(batch_sizes), None
        return loader

    @property
    def spec(self) -> Tree:
        """Shape (batch dimension first) and dtype of each array of a global batch."""
        return self._loader.spec

    def block(self, start: int, count: int, rows: slice | np.ndarray = slice(None)) -> Block:
        """Returns the batches of the steps [start, start + count).

        Fast if it starts where the last block ended; otherwise the threads or processes restart.

        Args:
            start: position of the first batch.
            count: number of batches.
            rows: which rows of each global batch; all by default.

        Raises:
            WorkerError: if a worker failed or died; the message names the example.
        """
        # As indices, so that two requests for the same rows compare equal. Batches of a source that
        # collates are always whole.
        wanted = np.arange(self.batch_size)
        if self.num_shapes is None:
            wanted = wanted[rows]
        stream = self._stream
        # A jump happens once, when a run starts or resumes; afterwards blocks follow each other.
        if stream is None or not stream.is_at(start, wanted):
            self.close()
            self._stream = stream = self._open(start, wanted)
        try:
            return stream.take(count)
        except BaseException as error:
            # Otherwise Grain would continue after the failed task and skip its rows.
            self.close()
            if self._workers and isinstance(error, RuntimeError):
                raise self._as_worker_error(error, stream) from error
            raise

    def close(self) -> None:
        """Ends the threads and processes; the next block starts them again."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.elements.close()

    def _open(self, step: int, rows: np.ndarray) -> _Stream:
        import grain.python as grain

        task_rows = self._task_rows if self.num_shapes is None else len(rows)
        tasks = _Tasks(self._loader, rows, task_rows, step, in_worker=self._workers > 0)
        num_tasks = self._ahead * tasks.per_step
        # At least one task per thread, or some threads would idle; otherwise what covers `ahead`
        # batches, divided among the workers.
        buffer = max(self._threads, -(-num_tasks // max(1, self._workers)))
        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=buffer if self._threads else 0
        )
        dataset = grain.MapDataset.source(tasks).to_iter_dataset(options)
        return _Stream(tasks, iter(prefetch_in_workers(dataset, self._workers, buffer)))

    def _as_worker_error(self, error: RuntimeError, stream: _Stream) -> WorkerError:
        """Returns the error of a worker, or a new one for a worker that died silently."""
        if isinstance(error, WorkerError):
            return error
        # The results arrive in order, so the task that is missing is the next one.
        step, rows = stream.tasks.locate(stream.num_taken)
        ids = self._loader.order(step, 1)[0][0, rows]
        records = ', '.join(describe(self._source, i) for i in ids.tolist() if i != PADDING)
        return WorkerError(
            f'a data worker process died: {worker_death_cause(error)}. Its first missing '
            f'task is rows {rows[0]} to {rows[-1]} of the batch at position {step}: {records}. '
            'Exit code -9 means that it was killed, often because memory ran out (use fewer '
            'workers or a smaller `ahead`); -11 is a crash in the library that decodes the record.'
        )


@dataclasses.dataclass(frozen=True)
class _Tasks:
    """The endless sequence of tasks that Grain reads; each is some rows of one batch.

    Attributes:
        loader: produces the batches.
        rows: which rows of each batch to read.
        task_rows: rows per task.
        first_step: position of the batch of task 0.
        in_worker: whether tasks run in a worker process, so errors must be picklable.
    """

    loader: TrainLoader
    rows: np.ndarray
    task_rows: int
    first_step: int
    in_worker: bool

    @property
    def per_step(self) -> int:
        """Number of tasks per batch."""
        return -(-len(self.rows) // self.task_rows)

    def locate(self, task: int) -> tuple[int, np.ndarray]:
        """Returns the position of a task's batch, and the rows in it."""
        step, part = divmod(task, self.per_step)
        # The last task of a batch may have fewer rows.
        first = part * self.task_rows
        return self.first_step + step, self.rows[first : first + self.task_rows]

    def __len__(self) -> int:
        # Training data has no end, and Grain wants a length.
        return sys.maxsize

    def __getitem__(self, task: int) -> dict[str, Any]:
        step, rows = self.locate(task)
        try:
            block = self.loader.block(step, 1, rows)
        except Exception as error:
            if not self.in_worker:
                raise
            raise to_portable(error) from None
        return {'arrays': nested.map_arrays(lambda x: x[0], block.arrays), 'ids': block.ids[0]}


class _Stream:
    """Joins the results of consecutive tasks into blocks of batches.

    Attributes:
        tasks: the tasks.
        elements: Grain's iterator over their results.
        num_taken: number of results taken so far.
    """

    def __init__(self, tasks: _Tasks, elements: Any):
        self.tasks = tasks
        self.elements = elements
        self.num_taken = 0

    def is_at(self, step: int, rows: np.ndarray) -> bool:
        """Whether the next batch is that of `step`, with these rows."""
        position, _ = self.tasks.locate(self.num_taken)
        return position == step and np.array_equal(self.tasks.rows, rows)

    def take(self, count: int) -> Block:
        """Returns the next batches."""
        parts = []
        for _ in range(count * self.tasks.per_step):
            parts.append(next(self.elements))
            self.num_taken += 1
        if self.tasks.loader.num_shapes is not None:
            # Whole batches, whose arrays need not have a row for each example.
            arrays = stack_batches([part['arrays'] for part in parts])
            return Block(arrays, np.stack([part['ids'] for part in parts]))
        shape = (count, len(self.tasks.rows))

        def join(*pieces: np.ndarray) -> np.ndarray:
            whole = np.concatenate(pieces)
            return whole.reshape(*shape, *whole.shape[1:])

        arrays = nested.map_arrays(join, *[part['arrays'] for part in parts])
        return Block(arrays, join(*[part['ids'] for part in parts]))
