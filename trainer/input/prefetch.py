# SPDX-License-Identifier: Apache-2.0
"""Batches ahead of time: a thread gathers blocks of steps and puts them on the devices."""

from __future__ import annotations

import contextlib
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
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainer.input.fields import Fields
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

Batch = dict[str, Any]


class Prefetcher:
    """Iterates over (count, batch): the arrays of one step, or of `count` > 1 stacked steps.

    There is one iteration: a second loop goes on where the first one stopped, and finds nothing
    after the end, an exception or `close`. An exception in the thread (a source, a transform) is
    raised from the iteration with its own traceback, after the blocks before it.

    Attributes:
        wait_secs: time that the iteration spent waiting for batches.
        state: where a stream stands behind the batches that `take_ids` has returned; None before,
            and for a loader whose place is its position.
        rows: which rows of a global batch this process reads, None for all.
    """

    def __init__(
        self,
        block: Callable[[int, int], Any],
        calls: Iterable[int],
        sharding: NamedSharding,
        *,
        rows: ProcessRows | None = None,
        fields: Fields | None = None,
        host: Sequence[str] = (),
        start: int = 0,
        depth: int = 2,
        release: Callable[[], None] | None = None,
    ):
        """Starts the thread; without a transfer, the iteration starts it.

        Args:
            block: `block(start, count)` returns `.arrays` of shape (count, rows, ...) and `.ids`.
            calls: the number of steps of each item, in order; its end is the end of the iteration.
            sharding: where the arrays of one step go.
            rows: which rows of a global batch a block has, if not all.
            fields: those that are sent to the devices; None for all of a block.
            host: names of fields that `on_host` returns.
            start: position of the first batch.
            depth: number of blocks that are kept ready.
            release: called by `close` when no block is asked for any more.
        """
        self.wait_secs = 0.0
        self.state: Any = None
        self._block = block
        self._release = release
        self._sharding = sharding
        self.rows = rows
        self._fields = fields
        self._host = tuple(host)
        self._kept: list[tuple[int, int, dict[str, np.ndarray]]] = []
        # The memory of a lone CPU device is the host's: the compiled call reads numpy arrays as
        # they are, and a transfer of each would only take the interpreter's lock from the loop.
        devices = sharding.mesh.devices
        self._on_host = devices.size == 1 and devices.flat[0].platform == 'cpu'
        self._handed_out: list[tuple[int, np.ndarray, Sequence[Any]]] = []
        self._items = self._prepare(start, iter(calls))
        self._batches = self._iterate()
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(1, depth))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name='prefetch', daemon=True)
        if not self._on_host:
            self._thread.start()

    @classmethod
    def on_mesh(
        cls,
        block: Callable[..., Any],
        calls: Iterable[int],
        mesh: Mesh,
        batch_rows: int,
        *,
        start: int = 0,
        depth: int = 2,
        **options: Any,
    ) -> Prefetcher:
        """Returns the batches of a loader; each process reads the rows of its own devices.

        Args:
            block: of a loader: `block(start, count, rows=...)`.
            calls: as in the constructor, like `start`, `depth` and the options.
            mesh: the device mesh.
            batch_rows: rows of a global batch.
            start: position of the first batch.
            depth: number of blocks that are kept ready.
            **options: `fields`, `host` and `release`.
        """
        sharding, rows = batch_sharding(mesh), None
        if jax.process_count() > 1:
            rows = ProcessRows.of(mesh, batch_rows)
            block = functools.partial(block, rows=rows.held)
        return cls(block, calls, sharding, rows=rows, start=start, depth=depth, **options)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
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

    def take_ids(self, stop: int) -> list[tuple[int, np.ndarray]]:
        """Returns (position, example ids) of the batches before `stop`, each batch once."""
        taken, kept = [], []
        for start, ids, states in self._handed_out:
            cut = min(max(0, stop - start), len(ids))
            if cut:
                taken.append((start, ids[:cut]))
                self.state = states[cut - 1] if states else None
            if cut < len(ids):
                kept.append((start + cut, ids[cut:], states[cut:]))
        self._handed_out = kept
        return taken

    def on_host(self, position: int) -> dict[str, np.ndarray]:
        """Returns the `host` fields of a batch, as its block has them: (rows, ...).

        Args:
            position: of a batch that was handed out; earlier ones are released.
        """
        if not self._host:
            return {}
        self._kept = [each for each in self._kept if each[1] > position]
        start, _, arrays = self._kept[0]
        return {name: x[position - start] for name, x in arrays.items()}

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

    def _iterate(self) -> Generator[tuple[int, Batch], None, None]:
        cost = _Cost()
        while True:
            began, worked = time.perf_counter(), time.thread_time()
            item = self._next_item()
            waited = time.perf_counter() - began
            self.wait_secs += waited
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            start, ids, states, kept, batches = item
            self._handed_out.append((start, ids, states))
            if self._host:
                self._kept.append((start, start + len(ids), kept))
            if not self._thread.ident:
                cost.add(waited, time.thread_time() - worked, len(ids))
                if cost.is_high:
                    self._thread.start()
            yield from batches

    def _next_item(self) -> Any:
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

    def _prepare(self, start: int, calls: Iterator[int]) -> Iterator[tuple[Any, ...]]:
        """Yields (position, ids, states, batches of the calls) of one block after the other."""
        # Small blocks first: the first step must not wait for the sixty-fourth batch.
        limit = 1
        while counts := _take(calls, limit):
            steps, began = sum(counts), time.perf_counter()
            block = self._block(start, steps)
            in_time = _BLOCK_SECS * steps / max(time.perf_counter() - began, 1e-9)
            states = getattr(block, 'states', None) or ()
            kept = {name: block.arrays[name] for name in self._host}
            arrays = block.arrays
            if self._fields is not None:
                arrays = self._fields.placed(arrays, block.ids)
            yield start, block.ids, states, kept, self._place(arrays, counts)
            start += steps
            fitting = min(_BLOCK_BYTES // _batch_bytes(block), int(in_time))
            limit = min(2 * limit, _BLOCK_STEPS, max(1, fitting))

    def _place(self, arrays: dict[str, np.ndarray], counts: list[int]) -> list[tuple[int, Batch]]:
        """Cuts a block into its calls and puts them on the devices in one transfer."""
        stacked = NamedSharding(self._sharding.mesh, PartitionSpec(None, *self._sharding.spec))
        ends = list(itertools.accumulate(counts))
        cuts = [
            end - 1 if n == 1 else slice(end - n, end) for n, end in zip(counts, ends, strict=True)
        ]
        batches = [{name: x[cut] for name, x in arrays.items()} for cut in cuts]
        if self._on_host:
            return list(zip(counts, batches, strict=True))
        if self.rows is not None:
            assembled = [
                {
                    name: self.rows.assemble(x, self._sharding if n == 1 else stacked)
                    for name, x in batch.items()
                }
                for n, batch in zip(counts, batches, strict=True)
            ]
            return list(zip(counts, assembled, strict=True))
        shardings = [dict.fromkeys(arrays, self._sharding if n == 1 else stacked) for n in counts]
        return list(zip(counts, jax.device_put(batches, shardings), strict=True))


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


def _batch_bytes(block: Any) -> int:
    return max(1, sum(x.nbytes // len(x) for x in block.arrays.values()))
