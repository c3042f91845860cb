# SPDX-License-Identifier: Apache-2.0
"""The training loader for sources that are slow to read: threads or processes make its batches."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from .compat import worker_death
from .loader import Block, TrainLoader
from .order import PADDING, Marks
from .record_errors import describe
from .sources import Arrays, ArraySpec, Source
from .workers import WorkerError, portable, prefetched


class GrainLoader:
    """The batches of `TrainLoader`, read and transformed ahead of time by Grain.

    For records that are read from disk and decoded. What stands in memory is quicker with
    TrainLoader: a gather of many rows costs less than handing them over.

    A batch is cut into tasks of a few rows, which threads or worker processes take in turn. The
    tasks are a pure function of the position, so that neither their number nor the workers' shows
    in a batch.

    Attributes:
        batch_size: rows of a global batch.
        steps_per_epoch: a fraction only where batches run across epoch borders.
    """

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
        workers: int = 0,
        threads: int | None = None,
        task_rows: int = 32,
        ahead: int = 2,
    ):
        """Makes a loader; threads and processes start with the first block.

        Args:
            source: where examples come from; it is sent to the workers, so it must pickle.
            batch_size: rows of a global batch.
            transforms: run over the rows of each task, see `trainer.data.transforms`.
            seed: of the order and of random transforms.
            shuffle: a new order in each epoch, or the source's.
            remainder: 'carry', 'pad' or 'drop': see `trainer.data.order.Order`.
            repeat_batch: use only the first so many batches, over and over.
            workers: processes that read and transform; 0 for threads of this one, which suffice
                where the work is done outside Python (files, decoding of images).
            threads: of each process; by default 8, and none beside its own in a worker.
            task_rows: rows that are read and transformed at once.
            ahead: batches that are kept ready.

        Raises:
            ValueError: as `TrainLoader`, or if a number is out of its range.
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
    def marks(self) -> Marks:
        """What a run whose batch size has changed had consumed by which step."""
        return self._loader.marks

    @property
    def first(self) -> Arrays:
        """The first example of the source, as in epoch 0, each field as (1, ...)."""
        return self._loader.first

    def after(self, batch_sizes: Sequence[tuple[int, int]]) -> GrainLoader:
        """Returns the loader of a run whose batch size has changed: see `TrainLoader.after`."""
        loader = copy.copy(self)
        loader._loader, loader._stream = self._loader.after(batch_sizes), None
        return loader

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape (batch dimension first) and dtype of each array of a global batch."""
        return self._loader.spec

    def block(self, start: int, count: int, rows: slice | np.ndarray = slice(None)) -> Block:
        """Returns the batches of the steps [start, start + count).

        Quick where the last block ended; anywhere else the threads or processes start anew.

        Args:
            start: position of the first batch.
            count: number of batches.
            rows: which rows of each global batch; all by default.

        Raises:
            WorkerError: if a worker failed or died; it names the example.
        """
        wanted = np.arange(self.batch_size)[rows]
        stream = self._stream
        if stream is None or not stream.stands_at(start, wanted):
            self.close()
            self._stream = stream = self._open(start, wanted)
        try:
            return stream.take(count)
        except BaseException as error:
            # Grain would go on behind the task that failed.
            self.close()
            if self._workers and isinstance(error, RuntimeError):
                raise self._told(error, stream) from error
            raise

    def close(self) -> None:
        """Ends the threads and processes; the next block starts them again."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.elements.close()

    def _open(self, step: int, rows: np.ndarray) -> _Stream:
        import grain.python as grain

        tasks = _Tasks(self._loader, rows, self._task_rows, step, in_worker=self._workers > 0)
        in_all = self._ahead * tasks.per_step
        buffer = max(self._threads, -(-in_all // max(1, self._workers)))
        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=buffer if self._threads else 0
        )
        dataset = grain.MapDataset.source(tasks).to_iter_dataset(options)
        return _Stream(tasks, iter(prefetched(dataset, self._workers, buffer)))

    def _told(self, error: RuntimeError, stream: _Stream) -> WorkerError:
        """Returns the error of a worker, or what to say of one that died without a word."""
        if isinstance(error, WorkerError):
            return error
        step, rows = stream.tasks.place(stream.taken)
        ids = self._loader.order(step, 1)[0][0, rows]
        records = ', '.join(describe(self._source, i) for i in ids.tolist() if i != PADDING)
        return WorkerError(
            f'a worker process of the data has died: {worker_death(error)}. What it owed '
            f'begins with rows {rows[0]} to {rows[-1]} of the batch at position {step}: {records}. '
            'Exit code -9 is a kill from outside, often for want of memory (fewer workers, or a '
            'smaller `ahead`, need less); -11 is a crash in the library that decodes the record.'
        )


@dataclasses.dataclass(frozen=True)
class _Tasks:
    """What Grain reads from: task i is some rows of one batch; there is no end of them.

    Attributes:
        loader: what makes a batch.
        rows: the rows of each batch that are wanted.
        task_rows: rows of a task.
        first_step: the batch of task 0.
        in_worker: whether an error has to leave a worker process.
    """

    loader: TrainLoader
    rows: np.ndarray
    task_rows: int
    first_step: int
    in_worker: bool

    @property
    def per_step(self) -> int:
        """Number of tasks of a batch."""
        return -(-len(self.rows) // self.task_rows)

    def place(self, task: int) -> tuple[int, np.ndarray]:
        """Returns the position of a task's batch, and the rows in it."""
        step, part = divmod(task, self.per_step)
        first = part * self.task_rows
        return self.first_step + step, self.rows[first : first + self.task_rows]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, task: int) -> dict[str, Any]:
        step, rows = self.place(task)
        try:
            block = self.loader.block(step, 1, rows)
        except Exception as error:
            if not self.in_worker:
                raise
            raise portable(error) from None
        return {'arrays': {k: x[0] for k, x in block.arrays.items()}, 'ids': block.ids[0]}


class _Stream:
    """The tasks in their order, as blocks of batches.

    Attributes:
        tasks: what is read.
        elements: Grain's iterator over them.
        taken: number of tasks taken.
    """

    def __init__(self, tasks: _Tasks, elements: Any):
        self.tasks = tasks
        self.elements = elements
        self.taken = 0

    def stands_at(self, step: int, rows: np.ndarray) -> bool:
        """Whether the next task is the first one of these rows of a batch."""
        return self.tasks.place(self.taken)[0] == step and np.array_equal(self.tasks.rows, rows)

    def take(self, count: int) -> Block:
        """Returns the next batches."""
        parts = []
        for _ in range(count * self.tasks.per_step):
            parts.append(next(self.elements))
            self.taken += 1
        shape = (count, len(self.tasks.rows))

        def joined(pieces: list[np.ndarray]) -> np.ndarray:
            whole = np.concatenate(pieces)
            return whole.reshape(*shape, *whole.shape[1:])

        names = parts[0]['arrays']
        arrays = {name: joined([part['arrays'][name] for part in parts]) for name in names}
        return Block(arrays, joined([part['ids'] for part in parts]))
