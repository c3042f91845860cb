# SPDX-License-Identifier: Apache-2.0
"""Weights by path: names of slots, moving them between optimizers, and loading onto devices."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from trainer.checkpoint.errors import CheckpointError
from trainer.parallel.mesh import make_mesh
from trainer.weights import leaves
from trainer.weights.leaves import HostLeaf, OrbaxLeaf, align_slots


def test_paths_have_a_collection_and_a_key_path() -> None:
    tree = {'Dense_0': {'kernel': 1, 'bias': 2}, 'layers': [3]}
    assert leaves.flatten(tree, 'params/') == {
        'params/Dense_0/bias': 2, 'params/Dense_0/kernel': 1, 'params/layers/0': 3,
    }  # fmt: skip
    assert leaves.key_path('params/Dense_0/kernel') == 'Dense_0/kernel'
    assert leaves.with_key_path('params/Dense_0/kernel', 'head/kernel') == 'params/head/kernel'
    assert leaves.with_key_path('opt_state.0.count', 'head') == 'opt_state.0.count'
    assert leaves.is_slot('opt_state.0.mu/x') and not leaves.is_slot('params/opt_state.0')


def test_slots_are_found_at_any_depth_and_counts_beside_them() -> None:
    state = {
        'opt_state/0/count': 1, 'opt_state/0/mu/a/b': 2, 'opt_state/1/0/nu/a/b': 3,
        'opt_state/2/count': 4,
    }  # fmt: skip
    assert leaves.slots(state, ['a/b']) == {
        'opt_state.0.mu/a/b': 2, 'opt_state.1.0.nu/a/b': 3, 'opt_state.0.count': 1,
    }  # fmt: skip


def test_ambiguous_slots_are_not_guessed() -> None:
    def leaf(value: int) -> HostLeaf:
        return HostLeaf(np.array(value))

    one = {'opt_state.0.mu/x': leaf(1), 'opt_state.0.count': leaf(2), 'params/x': leaf(3)}
    wanted = ('params/x', 'opt_state.2.1.mu/x', 'opt_state.2.1.count', 'opt_state.3.count')
    found = align_slots(one, wanted)
    assert {p: int(x.array) for p, x in found.items() if isinstance(x, HostLeaf)} == {
        'params/x': 3, 'opt_state.2.1.mu/x': 1, 'opt_state.2.1.count': 2}  # fmt: skip
    two = {**one, 'opt_state.1.mu/x': leaf(4)}
    assert align_slots(two, wanted) == two
    assert align_slots(one, (*wanted, 'opt_state.4.mu/x')) == one


def test_weights_become_a_nested_dict() -> None:
    weights = leaves.from_arrays({'a': {'b': jnp.arange(3)}}, 'params/')
    assert (weights['params/a/b'].shape, weights['params/a/b'].dtype) == ((3,), np.int32)
    assert leaves.to_nested(weights)['params']['a']['b'].tolist() == [0, 1, 2]


def write(directory: pathlib.Path) -> dict[str, leaves.Leaf]:
    """Writes two arrays; the second is known by two paths."""
    path = epath.Path(directory / 'tree')
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, {'a': {'b': np.arange(16.0)}, 'count': np.int32(3)})
    ab = OrbaxLeaf(path, ('a', 'b'), (16,), np.dtype(float))
    count = OrbaxLeaf(path, ('count',), (), np.dtype(np.int32))
    return {'x': ab, 'one': count, 'two': count, 'host': HostLeaf(np.ones(8))}


def test_arrays_of_files_and_of_memory_are_read(tmp_path: pathlib.Path) -> None:
    weights = write(tmp_path)
    found = leaves.read_arrays(weights)
    assert list(found) == list(weights)
    assert found['x'].tolist() == list(range(16)) and found['one'] == found['two'] == 3
    assert leaves.read_array(weights['host']).sum() == 8


def test_arrays_are_loaded_with_the_wanted_dtypes_and_shardings(tmp_path: pathlib.Path) -> None:
    """A leaf with two paths gets two buffers, since a step donates each of them."""
    weights, mesh = write(tmp_path), make_mesh({'data': -1})
    sharded, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (['data'], []))
    wanted = {
        'x': jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharded),
        'one': jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        'two': jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        'host': jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=sharded),
    }
    found = leaves.load(weights, wanted)
    assert list(found) == list(weights)
    for path, x in found.items():
        assert (x.dtype, x.sharding) == (wanted[path].dtype, wanted[path].sharding)
    assert found['x'].tolist() == list(range(16)) and found['host'].sum() == 8
    found['one'].delete()
    assert found['two'] == 3


def test_a_loaded_array_does_not_share_memory_with_the_given_one() -> None:
    given = np.zeros(64, np.float32)
    sharding = NamedSharding(make_mesh({'data': -1}), PartitionSpec())
    wanted = {'x': jax.ShapeDtypeStruct((64,), jnp.float32, sharding=sharding)}
    loaded = leaves.load({'x': HostLeaf(given)}, wanted)['x']
    given[:] = 1
    assert not loaded.any()


def test_a_directory_that_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
    missing = OrbaxLeaf(epath.Path(tmp_path / 'none'), ('a',), (), np.dtype(float))
    with pytest.raises(CheckpointError, match='none cannot be read: '):
        leaves.read_array(missing)
