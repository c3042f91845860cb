# SPDX-License-Identifier: Apache-2.0
"""Saves: names, commits and digests; incomplete saves and other files are not checkpoints."""

from __future__ import annotations

import gc
import pathlib
import threading

import jax
import numpy as np
import pytest

from tests import command
from tests.checkpoint.examples import Delayed, abstract, state
from trainer.checkpoint.manager import Checkpoints, Retention
from trainer.config.errors import UserError


def open_in(directory: pathlib.Path, **retention: int) -> Checkpoints:
    return Checkpoints(directory, Retention(**retention))


def save_all(directory: pathlib.Path, *steps: int) -> None:
    checkpoints = open_in(directory, keep_last=len(steps))
    for step in steps:
        checkpoints.save(step, state(step), {'step': step})
    checkpoints.close()


@pytest.mark.parametrize('exists', [False, True])
def test_an_empty_directory(tmp_path: pathlib.Path, exists: bool) -> None:
    """Listing creates no directory, and a run starts from scratch."""
    directory = tmp_path / 'checkpoints'
    if exists:
        directory.mkdir()
    checkpoints = open_in(directory)
    assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
    assert not checkpoints.has(0)
    with pytest.raises(UserError, match=r'no checkpoint of step 3 .*; available: none'):
        checkpoints.restore(3, abstract(state()))
    checkpoints.wait()
    checkpoints.close()
    assert directory.exists() == exists


def test_a_checkpoint_is_named_by_its_step(tmp_path: pathlib.Path) -> None:
    save_all(tmp_path, 0, 7, 100, 12)
    assert {p.name for p in tmp_path.iterdir()} == {'0', '7', '12', '100'}
    checkpoints = open_in(tmp_path)
    assert checkpoints.steps() == [0, 7, 12, 100]
    assert checkpoints.latest() == 100
    assert checkpoints.has(7) and not checkpoints.has(8)
    assert checkpoints.meta(12)['step'] == 12


def test_other_names_are_neither_read_nor_removed(tmp_path: pathlib.Path) -> None:
    save_all(tmp_path, 5)
    foreign = ['notes', '5-backup', '007', '²', '-3', '6.orbax-checkpoint-tmp-0']
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / 'kept').write_text('mine')
    (tmp_path / 'readme.txt').write_text('mine')
    (tmp_path / '9').write_text('a file and not a directory')
    checkpoints = open_in(tmp_path)
    assert checkpoints.steps() == [5]
    checkpoints.restore(5, abstract(state()))
    checkpoints.save(6, state(), {})
    checkpoints.close()
    assert checkpoints.steps() == [5, 6]
    assert all((tmp_path / name / 'kept').exists() for name in foreign)
    assert (tmp_path / 'readme.txt').exists() and (tmp_path / '9').exists()


def test_an_incomplete_save_is_ignored_and_the_next_save_removes_it(
    tmp_path: pathlib.Path,
) -> None:
    """A crash in the middle of a save keeps the previous checkpoint."""
    save_all(tmp_path, 1, 2, 3)
    for step in (2, 3):
        (tmp_path / str(step) / 'commit_success.txt').unlink()
    (tmp_path / '4').mkdir()
    checkpoints = open_in(tmp_path, keep_last=9)
    assert checkpoints.steps() == [1]
    assert not checkpoints.has(3)
    with pytest.raises(UserError, match=r'available: 1$'):
        checkpoints.restore(3, abstract(state()))
    checkpoints.restore(1, abstract(state()))
    assert {p.name for p in tmp_path.iterdir()} == {'1', '2', '3', '4'}
    checkpoints.save(3, state(30), {})
    checkpoints.close()
    assert {p.name for p in tmp_path.iterdir()} == {'1', '3'}
    assert int(checkpoints.restore(3, abstract(state()))['count']) == 30


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        ('[]', 'it is a list, not an object'),
        ('[' * 5000 + ']' * 5000, 'levels of nesting'),
        ('{"custom_metadata": 3}', "'custom_metadata' is a number, not an object"),
        ('{"commit_timestamp_nsecs": "now"}', "'commit_timestamp_nsecs' is not a time"),
    ],
)
def test_damaged_metadata_of_orbax_does_not_fail_the_next_save(
    tmp_path: pathlib.Path, text: str, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_all(tmp_path, 5, 6)
    metadata = tmp_path / '6' / '_CHECKPOINT_METADATA'
    metadata.write_text(text)
    checkpoints = open_in(tmp_path, keep_last=3)
    checkpoints.restore(6, abstract(state()))
    checkpoints.save(7, state(7), {'step': 7})
    checkpoints.close()
    assert checkpoints.steps() == [5, 6, 7]
    assert (tmp_path / '6' / '_CHECKPOINT_METADATA.damaged').read_text() == text
    assert not metadata.exists() and (tmp_path / '5' / '_CHECKPOINT_METADATA').exists()
    assert problem in caplog.text and str(metadata) in caplog.text


def test_a_reader_does_not_touch_a_save_in_progress(tmp_path: pathlib.Path) -> None:
    writer, delayed = open_in(tmp_path), Delayed(x=1)
    writer.save(1, state(1), {})
    writer.save(2, state(2), {'delayed': delayed})
    try:
        assert delayed.reached.wait(60)
        reader = open_in(tmp_path)
        assert (reader.steps(), reader.best()) == ([1], None)
        assert int(reader.restore(1, abstract(state()))['count']) == 1
        reader.close()
        assert writer.has(2) and not reader.has(2)
    finally:
        delayed.release.set()
    writer.close()
    assert reader.steps() == [1, 2]
    assert int(reader.restore(2, abstract(state()))['count']) == 2


def test_the_digest_of_the_state_is_stored(tmp_path: pathlib.Path) -> None:
    save_all(tmp_path, 4, 5)
    checkpoints = open_in(tmp_path)
    assert checkpoints.meta(4)['digest'] == checkpoints.digest(state(4))
    assert checkpoints.meta(5)['digest'] == checkpoints.digest(state(5))
    assert checkpoints.digest(state(4)) != checkpoints.digest(state(5))


def test_steps_that_donate_the_state_do_not_change_the_save(tmp_path: pathlib.Path) -> None:
    """The save is delayed until ten steps have overwritten the buffers of the state."""
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    current, delayed = state(3), Delayed(x=1)
    expected = jax.tree.map(np.array, current)
    checkpoints = open_in(tmp_path)
    checkpoints.save(1, current, {'delayed': delayed})
    for _ in range(10):
        current = update(current)
    jax.block_until_ready(current)
    delayed.release.set()
    checkpoints.close()
    found = checkpoints.restore(1, abstract(expected))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_state_with_a_typed_key(tmp_path: pathlib.Path) -> None:
    """Orbax copies such a state in the caller's thread, as it does on an accelerator."""
    tree = {**state(), 'key': jax.random.key(8)}
    checkpoints = open_in(tmp_path)
    checkpoints.save(1, tree, {})
    checkpoints.save(2, tree, {})
    checkpoints.close()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    assert (checkpoints.restore(2, shapes)['key'] == tree['key']).all()
    shapes['key'] = jax.ShapeDtypeStruct((2,), 'float32')
    with pytest.raises(UserError, match=r'key: uint32\[2\] in the checkpoint, float32\[2\] in'):
        checkpoints.restore(2, shapes)


def test_no_thread_outlives_a_save_and_saving_works_after_close(tmp_path: pathlib.Path) -> None:
    gc.collect()
    before = set(threading.enumerate())
    checkpoints = open_in(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step), {})
        checkpoints.close()
        # Those of asyncio are asked to end, but not waited for.
        command.wait_for(lambda: set(threading.enumerate()) <= before)
    assert checkpoints.steps() == [1, 2]
