# SPDX-License-Identifier: Apache-2.0
"""Grain's threads and processes produce the batches of the in-memory loader, or say why not."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests import command
from trainer.data.grain_loader import GrainLoader
from trainer.data.loader import Block, TrainLoader
from trainer.data.sources import Arrays, ArraySource
from trainer.data.transforms import PerExample, RandomCrop, RandomFlip
from trainer.data.workers import WorkerError

EXAMPLES = 50


def images() -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (EXAMPLES, 6, 5, 1)).astype(np.uint8)
    return ArraySource({'image': pixels, 'label': np.arange(EXAMPLES)})


class Bad(ArraySource):
    """A source that fails at one example, or is killed by it."""

    def __init__(self, index: int, deadly: bool = False):
        super().__init__({'label': np.arange(EXAMPLES)})
        self.index = index
        self.deadly = deadly

    def gather(self, indices: np.ndarray) -> Arrays:
        if self.index in indices.tolist():
            if self.deadly and multiprocessing.parent_process() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            if not self.deadly:
                raise Unfit(self.index, 'is damaged')
        return super().gather(indices)

    def describe(self, index: int) -> str:
        return f'page {index} of a bad book'


class Unfit(Exception):
    """An exception that can be pickled but not unpickled: its constructor has other arguments."""

    def __init__(self, index: int, what: str):
        super().__init__(f'number {index} {what}')


def assert_equal(one: Block, other: Block) -> None:
    np.testing.assert_array_equal(one.ids, other.ids)
    assert one.arrays.keys() == other.arrays.keys()
    for name, x in one.arrays.items():
        np.testing.assert_array_equal(x, other.arrays[name])
        assert x.dtype == other.arrays[name].dtype


RANDOM = {'batch_size': 12, 'transforms': (RandomCrop(padding=2), RandomFlip()), 'seed': 3}


@pytest.fixture(scope='module', params=[0, pytest.param(2, marks=pytest.mark.slow)])
def make_loader(request: pytest.FixtureRequest) -> Iterator[GrainLoader]:
    """Returns a loader with batches of 12 rows and tasks of 5, so that the last task is shorter."""
    loader = GrainLoader(
        source=images(), remainder='pad', workers=request.param, task_rows=5, **RANDOM
    )
    yield loader
    loader.close()


def test_equals_the_in_memory_loader_at_any_position(make_loader: GrainLoader) -> None:
    plain = TrainLoader(source=images(), remainder='pad', **RANDOM)
    assert make_loader.spec == plain.spec
    assert make_loader.steps_per_epoch == plain.steps_per_epoch == 5
    assert make_loader.examples == plain.examples
    # Continues twice, jumps ahead, then back; below, the same for some of the rows.
    for start, count in ((0, 3), (3, 1), (4, 6), (23, 2), (2, 2)):
        assert_equal(make_loader.block(start, count), plain.block(start, count))
    for rows in (slice(4, 8), np.array([0, 7, 2])):
        assert_equal(make_loader.block(4, 2, rows), plain.block(4, 2, rows))
        assert_equal(make_loader.block(6, 1, rows), plain.block(6, 1, rows))


@pytest.mark.parametrize(
    'options', [{'remainder': 'carry'}, {'remainder': 'drop'}, {'repeat_batch': 2},
                {'shuffle': False}, {'task_rows': 100}, {'threads': 0}, {'ahead': 9}],
    ids=str,
)  # fmt: skip
def test_equals_the_in_memory_loader_with_any_option(options: dict[str, Any]) -> None:
    loader = GrainLoader(source=images(), **RANDOM, **options)
    for own in ('task_rows', 'threads', 'ahead'):
        options = {name: value for name, value in options.items() if name != own}
    assert_equal(loader.block(2, 9), TrainLoader(source=images(), **RANDOM, **options).block(2, 9))
    loader.close()


@pytest.mark.parametrize('remainder', ['carry', 'pad', 'drop'])
def test_equals_the_in_memory_loader_after_a_change_of_the_batch_size(remainder: str) -> None:
    sizes = ((0, 20), (1, 5), (5, 12))
    loader = GrainLoader(source=images(), remainder=remainder, **RANDOM)
    plain = TrainLoader(source=images(), remainder=remainder, **RANDOM).after(sizes)
    loader.block(0, 2)
    after = loader.after(sizes)
    for start, count in ((5, 3), (8, 4), (6, 1)):
        assert_equal(after.block(start, count), plain.block(start, count))
    assert after.marks == plain.marks
    np.testing.assert_array_equal(after.first['image'], plain.first['image'])
    after.close()
    loader.close()


@pytest.mark.slow
def test_a_block_owns_its_memory() -> None:
    """The devices may still read it after Grain has reused its shared memory."""
    loader = GrainLoader(source=images(), workers=1, **RANDOM)
    first = loader.block(0, 1)
    kept = {name: x.copy() for name, x in first.arrays.items()}
    for step in range(1, 20):
        loader.block(step, 1)
    loader.close()
    for name, x in first.arrays.items():
        assert x.flags.owndata or x.base.flags.owndata
        np.testing.assert_array_equal(x, kept[name])


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_record_is_named_and_never_skipped(workers: int) -> None:
    loader = GrainLoader(source=Bad(17), batch_size=20, shuffle=False, workers=workers, task_rows=6)
    for _ in range(2):
        with pytest.raises(WorkerError if workers else Unfit) as caught:
            loader.block(0, 1)
        message = ''.join([str(caught.value), *caught.value.__notes__])
        assert 'number 17 is damaged' in message
        assert 'while reading page 17 of a bad book' in message
        assert 'in gather' in message or not workers
    # What comes before and after it can be read.
    assert loader.block(0, 1, slice(0, 17)).ids.tolist() == [list(range(17))]
    assert loader.block(1, 1).ids.tolist() == [list(range(20, 40))]
    loader.close()


def fails_at_nine(example: dict[str, Any]) -> dict[str, Any]:
    if example['label'] == 9:
        raise ValueError('nine')
    return example


@pytest.mark.parametrize('kind', [TrainLoader, GrainLoader])
def test_a_transform_that_raises_names_the_record(kind: Any) -> None:
    loader = kind(source=images(), batch_size=20, transforms=(PerExample(fn=fails_at_nine),))
    with pytest.raises(ValueError, match='nine') as caught:
        loader.block(0, 3)
    notes = '\n'.join(caught.value.__notes__)
    assert 'while reading example 9 of the source ArraySource' in notes
    assert 'in transforms[0] = PerExample' in notes


def fail_together(batch: Arrays) -> Arrays:
    if len(batch['label']) > 1:
        raise ValueError('too many')
    return batch


def test_examples_that_fail_only_as_a_batch_are_listed() -> None:
    loader = TrainLoader(source=images(), batch_size=10, shuffle=False, transforms=(fail_together,))
    with pytest.raises(ValueError) as caught:
        loader.block(0, 1)
    assert 'the examples 0, 1, 2, 3, 4, 5, 6, 7, ... together' in caught.value.__notes__[-1]


@pytest.mark.slow
def test_the_error_for_a_dead_worker_names_its_records() -> None:
    loader = GrainLoader(
        source=Bad(23, deadly=True), batch_size=20, shuffle=False, workers=2, task_rows=2
    )
    with pytest.raises(WorkerError, match=r'exit code -9') as caught:
        loader.block(0, 2)
    # Workers run ahead: it may have died with tasks before that one still in its hands.
    owed = re.search(
        r'rows (\d+) to \d+ of the batch at position ([01]): (.*)\. Exit', str(caught.value)
    )
    assert owed is not None
    first = 20 * int(owed[2]) + int(owed[1])
    assert first <= 22
    assert owed[3] == f'page {first} of a bad book, page {first + 1} of a bad book'
    loader.close()


@pytest.mark.parametrize('name', ['workers', 'threads', 'task_rows', 'ahead'])
def test_numbers_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=rf'{name}: -1; expected at least [01]'):
        GrainLoader(source=images(), batch_size=4, **{name: -1})


# ---- in a process of its own -------------------------------------------------------------------

NOTEBOOK = """
import numpy as np
from trainer.data.grain_loader import GrainLoader
from trainer.data.sources import ArraySource

loader = GrainLoader(source=ArraySource({'x': np.arange(9)}), batch_size=4, workers=1)
print(loader.block(0, 2).arrays['x'].tolist(), loader.block(0, 2).ids.tolist())
"""


@pytest.mark.slow
def test_works_without_parsed_flags_and_exits_without_close() -> None:
    out = subprocess.run(
        [sys.executable, '-c', NOTEBOOK], cwd=command.ROOT, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    plain = TrainLoader(source=ArraySource({'x': np.arange(9)}), batch_size=4).block(0, 2)
    assert out.stdout.strip() == f'{plain.arrays["x"].tolist()} {plain.ids.tolist()}'


GRAIN = (
    '--config.data.loader.target=trainer.data.grain_loader:GrainLoader',
    '--config.data.loader.workers=2',
    '--config.data.loader.task_rows=64',
)


def child_processes(pid: int) -> list[int]:
    """Returns all descendants of a process."""
    own = pathlib.Path(f'/proc/{pid}/task').glob('*/children')
    direct = [int(child) for path in own for child in path.read_text().split()]
    return direct + [below for child in direct for below in child_processes(child)]


def is_alive(pid: int) -> bool:
    try:
        return ') Z ' not in pathlib.Path(f'/proc/{pid}/stat').read_text()
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_no_process_outlives_a_killed_trainer(tmp_path: pathlib.Path) -> None:
    process = command.start(
        command.MLP, *command.SMALL, *GRAIN, f'--workdir={tmp_path}',
        '--config.train_for=1000000steps',
    )  # fmt: skip
    command.wait_for(command.rows_written(tmp_path, at_least=1))
    below = child_processes(process.pid)
    assert len(below) >= 2
    process.kill()
    # Its pipes are at their end only when nobody holds them any more.
    process.communicate(timeout=60)
    command.wait_for(lambda: not any(is_alive(pid) for pid in below))


@pytest.mark.slow
def test_a_run_with_workers_equals_one_without(tmp_path: pathlib.Path) -> None:
    """A signal to the process group, as by Ctrl-C, saves and ends the run, which then resumes."""
    steps = '--config.train_for=3000steps'
    command.train(tmp_path / 'plain', steps)
    args = [command.MLP, *command.SMALL, *GRAIN, f'--workdir={tmp_path / "grain"}', steps]
    process = command.start(*args, group=True)
    command.wait_for(command.rows_written(tmp_path / 'grain', at_least=2))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert 0 < command.result(tmp_path / 'grain')['step'] < 3000
    finished = command.run(*args)
    assert finished.code == 0, finished.err
    plain, grain = (command.result(tmp_path / name) for name in ('plain', 'grain'))
    for name in ('status', 'step', 'digest', 'data_digest'):
        assert plain[name] == grain[name]
    assert command.rows(tmp_path / 'plain') == command.rows(tmp_path / 'grain')


@pytest.mark.slow
def test_a_bad_record_ends_the_run(tmp_path: pathlib.Path) -> None:
    finished = command.run(
        command.MLP, *GRAIN, f'--workdir={tmp_path}',
        f'--config.data.source={{"target": "{__name__}:BadImages"}}',
    )  # fmt: skip
    assert finished.code == 1
    assert 'while reading page 99 of a bad book' in finished.err


class BadImages(ArraySource):
    """Images like MNIST's, one of which is unreadable."""

    def __init__(self) -> None:
        images = np.zeros((200, 28, 28, 1), np.uint8)
        super().__init__({'image': images, 'label': np.zeros(200, np.int32)})

    def gather(self, indices: np.ndarray) -> Arrays:
        if 99 in indices.tolist():
            raise OSError('the disk is damaged')
        return super().gather(indices)

    def describe(self, index: int) -> str:
        return f'page {index} of a bad book'
