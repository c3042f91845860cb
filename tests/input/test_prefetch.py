# SPDX-License-Identifier: Apache-2.0
"""Prefetching: every batch once and in order, and a thread that always ends."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from trainer.data.loader import Block
from trainer.input.batch import LoadedBatch
from trainer.input.prefetch import Prefetcher

ROWS = 8


class Gather:
    """Blocks whose rows contain their position; tests may add an action for each."""

    def __init__(self, during: Callable[[int, int], None] = lambda start, count: None):
        self.during = during
        self.counts: list[int] = []
        self.threads: list[str] = []

    def __call__(self, start: int, count: int, rows: slice) -> Block:
        assert rows == slice(None)
        self.counts.append(count)
        self.threads.append(threading.current_thread().name)
        self.during(start, count)
        ids = np.arange(start, start + count)[:, None] * ROWS + np.arange(ROWS)
        states = [step + 1 for step in range(start, start + count)]
        return Block({'x': ids.astype(np.float32)}, ids, states)


def prefetcher(
    gather: Callable[..., Any], calls: Iterable[int], *, devices: int = 8, **options: Any
) -> Prefetcher:
    """Returns a prefetcher: on 8 devices it starts its thread at once, on one the loop reads."""
    mesh = jax.make_mesh(
        (devices,),
        ('data',),
        devices=jax.devices()[:devices],
        axis_types=(jax.sharding.AxisType.Auto,),
    )
    return Prefetcher(gather, calls, mesh, ROWS, **options)


def steps(batches: Iterable[LoadedBatch]) -> list[int]:
    """Returns the positions of the batches, and checks their shapes and fields."""
    found = []
    for batch in batches:
        count, x = batch.count, np.asarray(batch.arrays['x'])
        assert x.shape == ((ROWS,) if count == 1 else (count, ROWS))
        x = x.reshape(count, ROWS)
        assert (x == x[:, :1] + np.arange(ROWS)).all()
        positions = [int(first) // ROWS for first in x[:, 0]]
        assert positions == list(range(batch.start, batch.start + count))
        np.testing.assert_array_equal(batch.ids, x)
        assert batch.state == batch.start + count
        assert batch.rows is None and batch.host == {}
        found += positions
    return found


def thread_of(batches: Prefetcher) -> threading.Thread:
    return batches._thread


ON = pytest.mark.parametrize('devices', [1, 8])


@ON
@pytest.mark.parametrize(
    'calls', [[1] * 200, [3, 1, 1, 3, 5] * 20, [100, 1, 100], [1], [7], []], ids=str
)
@pytest.mark.parametrize('start', [0, 12345])
def test_every_batch_once_and_in_order(calls: list[int], start: int, devices: int) -> None:
    gather = Gather()
    with prefetcher(gather, calls, devices=devices, start=start, depth=3) as batches:
        items = list(batches)
    assert [batch.count for batch in items] == calls
    assert steps(items) == list(range(start, start + sum(calls)))
    assert sum(gather.counts) == sum(calls)


@ON
def test_blocks_start_small_and_grow(devices: int) -> None:
    gather = Gather()
    with prefetcher(gather, itertools.repeat(1, 200), devices=devices) as batches:
        list(batches)
    assert gather.counts[0] == 1
    assert all(b <= 2 * a for a, b in itertools.pairwise(gather.counts))
    assert 4 < max(gather.counts) <= 64


@ON
def test_the_iterator_stays_at_its_end(devices: int) -> None:
    with prefetcher(Gather(), [1, 1], devices=devices) as batches:
        assert steps(batches) == [0, 1]
        assert steps(batches) == []
    assert steps(batches) == []


@ON
def test_a_second_loop_continues_after_the_first(devices: int) -> None:
    with prefetcher(Gather(), itertools.repeat(1, 40), devices=devices) as batches:
        first = steps(itertools.islice(batches, 11))
        assert first + steps(batches) == list(range(40))


@ON
def test_fields_on_the_host_have_the_dimensions_of_the_others(devices: int) -> None:
    with prefetcher(Gather(), [1, 3, 1], devices=devices, host=('x',)) as batches:
        for batch in batches:
            assert isinstance(batch.host['x'], np.ndarray)
            np.testing.assert_array_equal(batch.host['x'], batch.arrays['x'])


@ON
def test_the_wait_for_a_block_is_that_of_its_first_batch(devices: int) -> None:
    gather = Gather(lambda start, count: time.sleep(0.01))
    with prefetcher(gather, itertools.repeat(1, 8), devices=devices) as batches:
        waits = [batch.wait_secs for batch in batches]
    firsts = {0, *itertools.accumulate(gather.counts[:-1])}
    assert len(firsts) < 8
    assert [wait > 0 for wait in waits] == [number in firsts for number in range(8)]
    if devices == 1:  # Otherwise the thread has begun before the loop.
        assert waits[0] > 0.009


class Torn(Exception):
    pass


@ON
def test_an_error_follows_the_batches_before_it_with_its_traceback(devices: int) -> None:
    def tear(start: int, count: int) -> None:
        if start + count > 20:
            raise Torn('record 20')

    seen: list[int] = []
    gather = Gather(tear)
    with (
        pytest.raises(Torn, match='record 20') as error,
        prefetcher(gather, itertools.repeat(1), devices=devices) as batches,
    ):
        for item in batches:
            seen += steps([item])
    assert seen == list(range(sum(gather.counts[:-1]))) != []
    assert any(frame.name == 'tear' for frame in error.traceback)
    assert steps(batches) == []
    assert not thread_of(batches).is_alive()


@ON
def test_an_error_in_the_iterator_of_calls(devices: int) -> None:
    def calls() -> Iterator[int]:
        yield 1
        raise Torn

    with pytest.raises(Torn), prefetcher(Gather(), calls(), devices=devices) as batches:
        list(batches)


@ON
def test_stop_iteration_in_a_loader_is_an_error(devices: int) -> None:
    def stop(start: int, count: int) -> None:
        if start:
            next(iter(()))

    with (
        pytest.raises(RuntimeError, match='StopIteration'),
        prefetcher(Gather(stop), itertools.repeat(1), devices=devices) as batches,
    ):
        list(batches)


# ---- the thread ends ---------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, 'waited in vain'
        time.sleep(0.001)


@pytest.mark.parametrize('depth', [1, 2, 5])
def test_close_with_a_full_queue(depth: int) -> None:
    gather = Gather()
    batches = prefetcher(gather, itertools.repeat(1), depth=depth)
    # One block more than there is room for: the thread waits with it.
    wait_for(lambda: len(gather.counts) == depth + 1)
    batches.close()
    assert not thread_of(batches).is_alive()
    assert len(gather.counts) == depth + 1
    assert steps(batches) == []
    batches.close()


def test_close_waits_for_the_current_block() -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow(start: int, count: int) -> None:
        began.set()
        assert go_on.wait(60)

    gather = Gather(slow)
    batches = prefetcher(gather, itertools.repeat(1))
    assert began.wait(60)
    closing = threading.Thread(target=batches.close)
    closing.start()
    wait_for(batches._stopped.is_set)
    assert closing.is_alive()
    go_on.set()
    closing.join(60)
    assert not closing.is_alive() and not thread_of(batches).is_alive()
    assert gather.counts == [1]


def test_close_without_reading() -> None:
    gather = Gather()
    with prefetcher(gather, itertools.repeat(1), devices=1) as batches:
        pass
    assert gather.counts == []
    assert steps(batches) == []


@ON
def test_leaving_the_context_early_ends_the_thread(devices: int) -> None:
    with prefetcher(Gather(), itertools.repeat(1), devices=devices) as batches:
        for item in batches:
            if steps([item]) == [33]:
                break
    assert not thread_of(batches).is_alive()
    assert steps(batches) == []


@ON
def test_ctrl_c_in_the_loop(devices: int) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        prefetcher(Gather(), itertools.repeat(1), devices=devices) as batches,
    ):
        for item in batches:
            if steps([item]) == [20]:
                signal.raise_signal(signal.SIGINT)
    assert not thread_of(batches).is_alive()


def test_ctrl_c_while_the_loop_waits_for_a_batch() -> None:
    go_on = threading.Event()

    def stall(start: int, count: int) -> None:
        if start > 20:
            os.kill(os.getpid(), signal.SIGINT)
            assert go_on.wait(60)

    with (
        pytest.raises(KeyboardInterrupt),
        prefetcher(Gather(stall), itertools.repeat(1)) as batches,
    ):
        try:
            for _ in batches:
                pass
        finally:
            go_on.set()
    assert not thread_of(batches).is_alive()


# ---- where batches are gathered ----------------------------------------------------------------


def compute(secs: float) -> None:
    """Keeps this thread busy for this much CPU time."""
    end = time.thread_time() + secs
    while time.thread_time() < end:
        pass


def test_cheap_batches_are_read_in_the_loop() -> None:
    gather = Gather()
    with prefetcher(gather, itertools.repeat(1, 500), devices=1) as batches:
        assert steps(batches) == list(range(500))
        assert not thread_of(batches).ident
    assert set(gather.threads) == {'MainThread'}


@pytest.mark.parametrize(
    'work',
    [lambda count: compute(0.01 * count), lambda count: time.sleep(0.15 * count)],
    ids=['computing', 'waiting'],
)
def test_expensive_batches_start_the_thread_at_once(work: Callable[[int], None]) -> None:
    gather = Gather(lambda start, count: work(count))
    with prefetcher(gather, itertools.repeat(1, 12), devices=1) as batches:
        assert steps(batches) == list(range(12))
    # The first block says nothing: it opens files, imports modules, shuffles.
    assert gather.threads[:2] == ['MainThread'] * 2
    assert set(gather.threads[2:]) == {'prefetch'}


def test_a_slow_first_block_is_ignored() -> None:
    gather = Gather(lambda start, count: None if start else compute(0.2))
    with prefetcher(gather, itertools.repeat(1, 50), devices=1) as batches:
        assert steps(batches) == list(range(50))
    assert set(gather.threads) == {'MainThread'}


@ON
def test_blocks_of_slow_batches_are_short(devices: int) -> None:
    """Otherwise the loop, and the save after a SIGTERM, would wait for 64 of them."""
    gather = Gather(lambda start, count: time.sleep(0.03 * count))
    with prefetcher(gather, itertools.repeat(1, 20), devices=devices) as batches:
        assert steps(batches) == list(range(20))
    assert max(gather.counts) <= 3
