# SPDX-License-Identifier: Apache-2.0
"""Batches ahead of time: a thread gathers blocks of steps and puts them on the devices."""

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
from trainer.parallel.mesh import ProcessRows, batch_sharding

# One gather serves many steps, because what costs is Python's work per call. A block that outgrows
# the cores' caches costs more than it saves; for one that takes long the loop waits, and `close`.
_BLOCK_STEPS = 64
_BLOCK_BYTES = 2**21
_BLOCK_SECS = 0.1
# A batch that is gathered faster than this is gathered in the loop itself, if it needs no transfer:
# handing the interpreter's lock between two threads costs more.
_CHEAP_SECS = 50e-6
_WINDOW_SECS = 2.0
# Slower than these in a single block is expensive beyond doubt. Time spent waiting proves less than
# time spent computing: the thread may have waited for the interpreter's lock, or for a core.
_EXPENSIVE_CPU_SECS = 5e-3
_EXPENSIVE_SECS = 0.1

Arrays = dict[str, Any]


class Prefetcher:
    """Iterates over batches, each of one step, or of several stacked ones.

    There is one iteration: a second loop continues where the first one stopped, and finds nothing
    after the end, an exception or `close`. An exception in the thread (a source, a transform) is
    raised from the iteration with its own traceback, after the blocks before it.
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
        start: int = 0,
        depth: int = 2,
        release: Callable[[], None] | None = None,
    ):
        """Starts the thread; without a transfer, the iteration starts it.

        Each process reads the rows of its own devices.

        Args:
            block: of the data: `block(start, count, rows=...)`.
            calls: the number of steps of each batch, in order; its end is the end of the iteration.
            mesh: the device mesh, over which the rows are sharded.
            batch_rows: rows of a global batch.
            fields: those that are sent to the devices; None for all of a block.
            host: names of fields that a batch also has as the loader has them.
            start: position of the first batch.
            depth: number of blocks that are kept ready.
            release: called by `close` when no block is asked for any more.
        """
        self._sharding = batch_sharding(mesh)
        self._stacked = batch_sharding(mesh, leading_dims=1)
        self._rows = ProcessRows.from_mesh(mesh, batch_rows) if jax.process_count() > 1 else None
        held = slice(None) if self._rows is None else self._rows.held
        self._block = functools.partial(block, rows=held)
        self._release = release
        self._fields = fields
        self._host = tuple(host)
        # The memory of a lone CPU device is the host's: the compiled call reads numpy arrays as
        # they are, and a transfer of each would only take the interpreter's lock from the loop.
        devices = mesh.devices
        self._on_host = devices.size == 1 and devices.flat[0].platform == 'cpu'
        self._items = self._prepare(start, iter(calls))
        self._batches = self._iterate()
        self._queue: queue.Queue[list[LoadedBatch] | BaseException | None] = queue.Queue(
            maxsize=max(1, depth)
        )
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

    def close(self) -> None:
        """Ends the iteration, and the thread as soon as it is done with its block; waits for it."""
        self._stopped.set()
        self._batches.close()
        while self._thread.is_alive():
            # It may be blocked on a full queue.
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
            self._thread.join(0.02)
        if self._release is not None:
            self._release()

    def _iterate(self) -> Generator[LoadedBatch, None, None]:
        cost = _Cost()
        while True:
            began, worked = time.perf_counter(), time.thread_time()
            batches = self._next_item()
            waited = time.perf_counter() - began
            if batches is None:
                return
            if isinstance(batches, BaseException):
                raise batches
            if not self._thread.ident:
                steps = sum(batch.count for batch in batches)
                cost.add(waited, time.thread_time() - worked, steps)
                if cost.is_high:
                    self._thread.start()
            batches[0] = dataclasses.replace(batches[0], wait_secs=waited)
            yield from batches

    def _next_item(self) -> list[LoadedBatch] | BaseException | None:
        return self._queue.get() if self._thread.ident else next(self._items, None)

    def _work(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                if self._stopped.is_set():
                    return
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def _prepare(self, start: int, calls: Iterator[int]) -> Iterator[list[LoadedBatch]]:
        """Yields the batches of one block after the other."""
        # Small blocks first: the first step must not wait for the sixty-fourth batch.
        limit = 1
        while counts := _take(calls, limit):
            steps, began = sum(counts), time.perf_counter()
            block = self._block(start, steps)
            in_time = _BLOCK_SECS * steps / max(time.perf_counter() - began, 1e-9)
            yield self._divide(start, block, counts)
            start += steps
            fitting = min(_BLOCK_BYTES // _batch_bytes(block), int(in_time))
            limit = min(2 * limit, _BLOCK_STEPS, max(1, fitting))

    def _divide(self, start: int, block: StreamBlock, counts: list[int]) -> list[LoadedBatch]:
        """Returns the batches of a block, one for each count."""
        arrays = block.arrays
        if self._fields is not None:
            arrays = self._fields.placed(arrays, block.ids)
        ends = list(itertools.accumulate(counts))
        spans = [slice(end - n, end) for n, end in zip(counts, ends, strict=True)]
        # A batch of one step has no dimension for steps.
        parts = [span if n > 1 else span.start for n, span in zip(counts, spans, strict=True)]
        on_devices = self._put([{k: x[part] for k, x in arrays.items()} for part in parts], counts)
        return [
            LoadedBatch(
                start + span.start,
                count,
                sent,
                block.ids[span],
                self._rows,
                block.states[span.stop - 1] if block.states else None,
                {name: block.arrays[name][part] for name in self._host},
            )
            for count, span, part, sent in zip(counts, spans, parts, on_devices, strict=True)
        ]

    def _put(self, batches: list[Arrays], counts: list[int]) -> list[Arrays]:
        """Returns the batches of a block on the devices, after one transfer."""
        if self._on_host:
            return batches
        shardings = [self._sharding if n == 1 else self._stacked for n in counts]
        pairs = list(zip(batches, shardings, strict=True))
        if self._rows is not None:
            put = self._rows.assemble
            return [{name: put(x, to) for name, x in batch.items()} for batch, to in pairs]
        return jax.device_put(batches, [dict.fromkeys(batch, to) for batch, to in pairs])


class _Cost:
    """Judges from each block's time whether batches are too expensive to be gathered in the loop.

    A single block does so only if it leaves no doubt, and else the fastest of a window: neither the
    mean nor the first ones, for an import in another thread, or a busy machine, slows blocks down
    for a while, and says nothing of what they cost.

    Attributes:
        is_high: the judgement so far.
    """

    def __init__(self) -> None:
        self.is_high = False
        self._is_first = True
        self._began = time.perf_counter()
        self._fastest = math.inf

    def add(self, secs: float, cpu_secs: float, batches: int) -> None:
        """Counts a block of so many batches: its time, and the part of it spent computing."""
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
    """Returns the next calls, at least one if there is one, up to `limit` steps in all."""
    counts: list[int] = []
    for count in calls:
        counts.append(count)
        if sum(counts) >= limit:
            break
    return counts


def _batch_bytes(block: Block) -> int:
    return max(1, sum(x.nbytes // len(x) for x in block.arrays.values()))
