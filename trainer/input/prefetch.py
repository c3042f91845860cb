# SPDX-License-Identifier: Apache-2.0
"""Prefetching: a thread reads blocks of batches ahead of time and puts them on the devices."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import jax
from jax.sharding import Mesh

from trainer.input.batch import LoadedBatch
from trainer.input.fields import Fields
from trainer.input.loader import Block, StreamBlock
from trainer.parallel.mesh import LocalExamples, batch_sharding, whole_batch_sharding

# Limits of a block. One gather serves many steps because of Python's overhead per call. But a block
# larger than the CPU caches is slower, and both the loop and `close` have to wait for a slow one.
_BLOCK_STEPS = 64
_BLOCK_BYTES = 2**21
_BLOCK_SECS = 0.1
# Batches that take less time than this are read by the loop itself, if they need no transfer:
# passing the interpreter lock between two threads costs more.
_CHEAP_SECS = 50e-6
_WINDOW_SECS = 2.0
# A single block that is slower than this per batch proves that batches are expensive. Wall time
# proves less than CPU time: the thread may have waited for the interpreter lock or for a core.
_EXPENSIVE_CPU_SECS = 5e-3
_EXPENSIVE_SECS = 0.1

Arrays = dict[str, Any]


class Prefetcher:
    """Iterates over batches, each of one step, or of several stacked ones.

    All loops share one iterator: a second loop continues where the first one stopped, and gets
    nothing after the end, an exception or `close`. An exception in the thread (from a source or a
    transform) is raised by the iterator with its own traceback, after the blocks before it.
    """

    def __init__(
        self,
        block: Callable[..., StreamBlock],
        calls: Iterable[int],
        mesh: Mesh,
        batch_rows: int,
        *,
        fields: Fields | None = None,
        host: Sequence[str] = (),
        num_shapes: int | None = None,
        start: int = 0,
        depth: int = 2,
        release: Callable[[], None] | None = None,
    ):
        """Starts the thread; if no transfer is needed, the iteration starts it when it pays off.

        Each process reads the rows of its own devices; whole batches are read by all.

        Args:
            block: method of the data: `block(start, count, rows=...)`.
            calls: the number of steps of each batch, in order; the iteration ends with it.
            mesh: the device mesh, over which the rows are sharded.
            batch_rows: rows of a global batch.
            fields: which fields are sent to the devices; None for all.
            host: names of fields to keep on the host too, in the dtypes of the loader.
            num_shapes: how many shapes whole batches may have; None for batches of rows.
            start: step of the first batch.
            depth: number of blocks to prefetch.
            release: called by `close` after the last call of `block`.
        """
        self._mesh = mesh
        self._is_whole = num_shapes is not None
        # Batches of different shapes cannot be stacked in one block.
        self._most_steps = 1 if self._is_whole else _BLOCK_STEPS
        self._sharding = batch_sharding(mesh)
        self._stacked = batch_sharding(mesh, leading_dims=1)
        self._rows = LocalExamples.from_mesh(mesh, batch_rows) if jax.process_count() > 1 else None
        rows = slice(None) if self._rows is None else self._rows.indices
        self._block = functools.partial(block, rows=rows)
        self._release = release
        self._fields = fields
        self._host = tuple(host)
        # A single CPU device shares the host's memory: compiled code reads numpy arrays directly,
        # and transfers would only compete with the loop for the interpreter lock. Without the
        # thread alone, a step of the MLP takes 1.00 [0.86, 1.23] of the CPU time
        # (`tests/benchmarks/beside.py OTHER mlp`, 11 pairs, jax 0.10.2).
        devices = mesh.devices
        self._on_host = devices.size == 1 and devices.flat[0].platform == 'cpu'
        self._items = self._prepare(start, iter(calls))
        self._batches = self._iterate()
        self._queue: queue.Queue[list[LoadedBatch] | BaseException | None] = queue.Queue(
            maxsize=max(1, depth)
        )
        self._waiting_since: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name='prefetch', daemon=True)
        if not self._on_host:
            self._thread.start()

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self._batches

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def waiting_secs(self) -> float:
        """Returns for how long the loop has been waiting for the next batch; 0 if it is not."""
        since = self._waiting_since
        return 0.0 if since is None else time.perf_counter() - since

    def close(self) -> None:
        """Ends the iteration, and waits for the thread to finish its current block."""
        self._stopped.set()
        self._batches.close()
        while self._thread.is_alive():
            # The thread may be blocked on a full queue.
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
            # In turns: the thread may put another item after the queue was emptied.
            self._thread.join(0.02)
        # Only when the thread has ended: it may be inside `block`, which opens again what is
        # released.
        if self._release is not None:
            self._release()

    def _iterate(self) -> Generator[LoadedBatch, None, None]:
        cost = _Cost()
        while True:
            began, worked = time.perf_counter(), time.thread_time()
            self._waiting_since = began
            batches = self._next_item()
            self._waiting_since = None
            waited = time.perf_counter() - began
            if batches is None:
                return
            # Raised here, in the thread of the loop, after all batches that came before it.
            if isinstance(batches, BaseException):
                raise batches
            if not self._thread.ident:
                steps = sum(batch.count for batch in batches)
                cost.add(waited, time.thread_time() - worked, steps)
                if cost.is_high:
                    self._thread.start()
            # The whole wait counts for the first batch of the block; the others were ready.
            batches[0] = dataclasses.replace(batches[0], wait_secs=waited)
            yield from batches

    def _next_item(self) -> list[LoadedBatch] | BaseException | None:
        return self._queue.get() if self._thread.ident else next(self._items, None)

    def _work(self) -> None:
        try:
            # Items are prepared one at a time: a queue that is full also stops the reading.
            for item in self._items:
                self._queue.put(item)
                if self._stopped.is_set():
                    return
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def _prepare(self, start: int, calls: Iterator[int]) -> Iterator[list[LoadedBatch]]:
        """Yields the batches of one block at a time."""
        # Start with small blocks: the first step must not wait for 64 batches.
        limit = 1
        while counts := _take(calls, limit):
            steps, began = sum(counts), time.perf_counter()
            block = self._block(start, steps)
            steps_in_time = _BLOCK_SECS * steps / max(time.perf_counter() - began, 1e-9)
            yield self._divide(start, block, counts)
            start += steps
            # The size adapts to the last block, because the cost of an example may change, as where
            # a source moves from one file to the next.
            max_steps = min(_BLOCK_BYTES // max(1, _batch_bytes(block)), int(steps_in_time))
            limit = min(2 * limit, self._most_steps, max(1, max_steps))

    def _divide(self, start: int, block: StreamBlock, counts: list[int]) -> list[LoadedBatch]:
        """Returns the batches of a block, one per entry of `counts`."""
        arrays = block.arrays
        if self._fields is not None:
            arrays = self._fields.to_device_dtypes(arrays, block.ids)
        ends = list(itertools.accumulate(counts))
        spans = [slice(end - n, end) for n, end in zip(counts, ends, strict=True)]
        # An integer index removes the dimension of steps from a batch of one step.
        parts = [span if n > 1 else span.start for n, span in zip(counts, spans, strict=True)]
        on_devices = self._put([{k: x[part] for k, x in arrays.items()} for part in parts], counts)
        ids, host = block.ids, {name: block.arrays[name] for name in self._host}
        if self._is_whole and self._rows is not None:
            # What stays on the host is divided over the processes, as everywhere.
            local = self._rows.indices
            ids, host = ids[:, local], {name: x[:, local] for name, x in host.items()}
        return [
            LoadedBatch(
                start + span.start,
                count,
                sent,
                ids[span],
                self._rows,
                block.states[span.stop - 1] if block.states else None,
                {name: x[part] for name, x in host.items()},
            )
            for count, span, part, sent in zip(counts, spans, parts, on_devices, strict=True)
        ]

    def _put(self, batches: list[Arrays], counts: list[int]) -> list[Arrays]:
        """Puts the batches of a block on the devices, with one transfer."""
        if self._on_host:
            return batches
        if self._is_whole:
            return [self._put_whole(*each) for each in zip(batches, counts, strict=True)]
        shardings = [self._sharding if n == 1 else self._stacked for n in counts]
        pairs = list(zip(batches, shardings, strict=True))
        if self._rows is not None:
            put = self._rows.assemble
            return [{name: put(x, to) for name, x in batch.items()} for batch, to in pairs]
        # One call for the whole block: the overhead of a call exceeds the transfer of a small
        # batch.
        return jax.device_put(batches, [dict.fromkeys(batch, to) for batch, to in pairs])

    def _put_whole(self, batch: Arrays, count: int) -> Arrays:
        """Puts a batch on the devices that this process has all of."""
        leading_dims = 0 if count == 1 else 1
        shardings = {
            name: whole_batch_sharding(self._mesh, x.shape, leading_dims=leading_dims)
            for name, x in batch.items()
        }
        if self._rows is None:
            return jax.device_put(batch, shardings)
        return {
            name: jax.make_array_from_callback(x.shape, shardings[name], x.__getitem__)
            for name, x in batch.items()
        }


class _Cost:
    """Measures whether batches are too expensive to be read in the training loop itself.

    Decided by the fastest block of a time window, or by a single block that is very slow. Not by
    the mean or the first blocks: an import in another thread or a busy machine slows some blocks
    down, which says nothing about their cost.

    Attributes:
        is_high: whether batches were found to be too expensive.
    """

    def __init__(self) -> None:
        self.is_high = False
        self._is_first = True
        self._began = time.perf_counter()
        self._fastest = math.inf

    def add(self, secs: float, cpu_secs: float, batches: int) -> None:
        """Adds a block: its wall time, its CPU time, and its number of batches."""
        self._fastest = min(self._fastest, secs / batches)
        # The first block opens files, imports modules and shuffles the epoch.
        if not self._is_first:
            self.is_high |= cpu_secs / batches > _EXPENSIVE_CPU_SECS
            self.is_high |= secs / batches > _EXPENSIVE_SECS
        self._is_first = False
        if time.perf_counter() - self._began >= _WINDOW_SECS:
            self.is_high |= self._fastest > _CHEAP_SECS
            self._began, self._fastest = time.perf_counter(), math.inf


def _take(calls: Iterator[int], limit: int) -> list[int]:
    """Returns the next calls until they reach `limit` steps; empty at the end."""
    counts: list[int] = []
    for count in calls:
        counts.append(count)
        if sum(counts) >= limit:
            break
    return counts


def _batch_bytes(block: Block) -> int:
    # At least 1: it is a divisor, and a batch may have no fields.
    return max(1, sum(x.nbytes // len(x) for x in block.arrays.values()))
