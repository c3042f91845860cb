# SPDX-License-Identifier: Apache-2.0
"""The calls of the checkpoint guide with current versions of Orbax and Flax."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import errors
from flax.training import checkpoints, orbax_utils
from jax.sharding import NamedSharding, PartitionSpec

from tests.checkpoint.examples import abstract, state
from trainer.checkpoint.errors import SaveError
from trainer.checkpoint.manager import Checkpoints, Retention
from trainer.config.durations import Periodic
from trainer.weights import restore

TREE = {'a': np.arange(4.0), 'b': {'c': np.ones((2, 3))}}


def manager(directory: pathlib.Path, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(**options))


def save_steps(found: ocp.CheckpointManager, steps: range, **options: Any) -> list[int]:
    """Saves steps; returns those that are kept."""
    for step in steps:
        found.save(step, args=ocp.args.StandardSave(TREE), **options)
    found.wait_until_finished()
    kept = list(found.all_steps())
    found.close()
    return kept


def files(directory: pathlib.Path) -> int:
    return sum(path.is_file() for path in directory.rglob('*'))


@pytest.mark.slow
def test_small_arrays_are_aggregated(tmp_path: pathlib.Path) -> None:
    """The arguments of the guide are still accepted; the current format, which a run uses too,
    puts 200 arrays into a few files, while the old one has a file for each."""
    tree = {f'x{number}': number + jnp.arange(3.0) for number in range(200)}
    args = orbax_utils.save_args_from_target(tree)
    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(tmp_path / 'bundled', tree, save_args=args)
    apart = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
    apart.save(tmp_path / 'apart', args=ocp.args.PyTreeSave(tree, save_args=args))
    ours = Checkpoints(tmp_path / 'ours', Retention())
    ours.save(1, tree, {})
    ours.close()
    assert files(tmp_path / 'apart') > 200
    assert files(tmp_path / 'bundled') < 40 and files(tmp_path / 'ours') < 40
    for found in (checkpointer.restore(tmp_path / 'bundled'), ours.restore(1, abstract(tree))):
        jax.tree.map(np.testing.assert_array_equal, found, tree)


def test_the_newest_are_kept(tmp_path: pathlib.Path) -> None:
    """Two of five, by Orbax's manager."""
    assert save_steps(manager(tmp_path, max_to_keep=2), range(5)) == [3, 4]


def test_every_second_is_kept(tmp_path: pathlib.Path) -> None:
    """In addition to the last three; a prefix is part of the directory name."""
    options = {'max_to_keep': 3, 'keep_period': 2, 'step_prefix': 'test'}
    assert save_steps(manager(tmp_path, **options), range(5)) == [0, 2, 3, 4]
    assert {path.name for path in tmp_path.iterdir()} >= {'test_0', 'test_4'}


def test_every_second_is_kept_by_a_run(tmp_path: pathlib.Path) -> None:
    """The same steps by `checkpoint.keep_last` and `checkpoint.keep_every`."""
    ours = Checkpoints(tmp_path, Retention(keep_last=3, keep_every=Periodic(Fraction(2))))
    for step in range(5):
        ours.save(step, state(step), {})
    ours.close()
    assert ours.steps() == [0, 2, 3, 4]


@pytest.fixture
def msgpack() -> Iterator[None]:
    """Makes Flax write its own format instead of Orbax's."""
    flax.config.update('flax_use_orbax_checkpointing', False)
    yield
    flax.config.update('flax_use_orbax_checkpointing', True)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.usefixtures('msgpack')
def test_flax_does_not_keep_step_0(tmp_path: pathlib.Path) -> None:
    """`keep_every_n_steps` never keeps it, contrary to the guide; the run above does."""
    for step in range(5):
        checkpoints.save_checkpoint(tmp_path, TREE, step, keep=3, keep_every_n_steps=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f'checkpoint_{step}' for step in (1, 2, 3, 4)}


def test_by_interval_and_by_metric(tmp_path: pathlib.Path) -> None:
    """An interval skips saves; the best checkpoint is kept although it is old."""
    assert save_steps(manager(tmp_path / 'every', save_interval_steps=2), range(5)) == [0, 2, 4]
    best = manager(
        tmp_path / 'best', max_to_keep=1, best_fn=lambda metrics: metrics['loss'], best_mode='min'
    )
    for step, loss in enumerate((3.0, 1.0, 2.0)):
        best.save(step, args=ocp.args.StandardSave(TREE), metrics={'loss': loss})
    best.wait_until_finished()
    assert best.best_step() == 1 and 1 in best.all_steps()
    best.close()


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.usefixtures('msgpack')
@pytest.mark.parametrize('step', [2, 1])
def test_flax_overwrites_no_step(step: int, tmp_path: pathlib.Path) -> None:
    """Flax refuses the newest step and older ones, unless `overwrite` is set."""
    checkpoints.save_checkpoint(tmp_path, TREE, step=2)
    with pytest.raises(errors.InvalidCheckpointError):
        checkpoints.save_checkpoint(tmp_path, TREE, step=step)
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoint_2']
    checkpoints.save_checkpoint(tmp_path, {'a': np.zeros(3)}, step=step, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [f'checkpoint_{step}']
    assert restore.raw(tmp_path)['a'].tolist() == [0.0] * 3


def test_saving_to_the_same_directory_again(tmp_path: pathlib.Path) -> None:
    """A checkpointer of Orbax overwrites a directory only with `force`."""
    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(tmp_path / 'tree', TREE)
    with pytest.raises(ValueError, match='already exists'):
        checkpointer.save(tmp_path / 'tree', {'a': np.zeros(3)})
    jax.tree.map(np.testing.assert_array_equal, checkpointer.restore(tmp_path / 'tree'), TREE)
    checkpointer.save(tmp_path / 'tree', {'a': np.zeros(3)}, force=True)
    assert restore.raw(tmp_path / 'tree')['a'].tolist() == [0.0] * 3


def test_saving_the_same_step_again(tmp_path: pathlib.Path) -> None:
    """Orbax's manager skips it, or raises with `force`; a save of a run fails, and the old
    checkpoint does not change."""
    theirs = manager(tmp_path / 'new')
    theirs.save(3, args=ocp.args.StandardSave(TREE))
    theirs.wait_until_finished()
    for step in (3, 2):
        assert not theirs.save(step, args=ocp.args.StandardSave(TREE))
    with pytest.raises(ocp.checkpoint_manager.StepAlreadyExistsError):
        theirs.save(3, args=ocp.args.StandardSave(TREE), force=True)
    theirs.close()
    ours = Checkpoints(tmp_path / 'ours', Retention())
    ours.save(3, state(1), {})
    ours.wait()
    ours.save(3, state(2), {})
    with pytest.raises(SaveError, match='step 3 already exists'):
        ours.close()
    found = Checkpoints(tmp_path / 'ours', Retention()).restore(3, abstract(state(1)))
    jax.tree.map(np.testing.assert_array_equal, found, state(1))


def test_saved_on_one_mesh_and_restored_on_others(tmp_path: pathlib.Path) -> None:
    """From (4, 2) to (2, 4), (8,) and one device: equal values, the requested shardings."""

    def sharding(shape: tuple[int, ...], spec: Sequence[str | None]) -> NamedSharding:
        count, names = math.prod(shape), ('x', 'y')[: len(shape)]
        types = (jax.sharding.AxisType.Auto,) * len(shape)
        mesh = jax.make_mesh(shape, names, axis_types=types, devices=jax.devices()[:count])
        return NamedSharding(mesh, PartitionSpec(*spec))

    values = np.arange(128, dtype='f4').reshape(8, 16)
    ours = Checkpoints(tmp_path, Retention())
    ours.save(1, {'w': jax.device_put(values, sharding((4, 2), ('x', 'y')))}, {})
    ours.close()
    for shape, spec, shard in (
        ((2, 4), ('x', 'y'), (4, 4)),
        ((2, 4), ('y', None), (2, 16)),
        ((8,), (None, 'x'), (8, 2)),
        ((8,), ('x',), (1, 16)),
        ((1,), (), (8, 16)),
    ):
        asked = sharding(shape, spec)
        wanted = {'w': jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=asked)}
        found = Checkpoints(tmp_path, Retention()).restore(1, wanted)['w']
        assert found.sharding == asked
        assert {part.data.shape for part in found.addressable_shards} == {shard}
        np.testing.assert_array_equal(found, values)


def test_metadata_of_a_step(tmp_path: pathlib.Path) -> None:
    """The metadata of a run, with strings and lists, is in its checkpoint."""
    ours = Checkpoints(tmp_path, Retention())
    known = {'config': {'model': {'target': 'a:B', 'features': [64, 10]}}, 'note': 'text'}
    ours.save(7, state(1), known)
    ours.close()
    found = Checkpoints(tmp_path, Retention())
    assert found.meta(7)['config'] == known['config']
    assert found.meta(7)['note'] == 'text'
    jax.tree.map(np.testing.assert_array_equal, found.restore(7, abstract(state(1))), state(1))
