# SPDX-License-Identifier: Apache-2.0
"""Weights by path, in memory or in files, and loading them onto devices.

A path is a collection and a key path in it: 'params/Dense_0/kernel', 'batch_stats/norm/mean'. Each
slot of an optimizer is a collection too: 'opt_state.0.mu/Dense_0/kernel'. Arrays are read only when
they are needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from trainer.checkpoint.errors import CheckpointError, first_line
from trainer.modules.model_view import param_path, path_names

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Keys = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class HostLeaf:
    """An array in host memory, or a view of a mapped file, which is read where it is indexed."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's dimensions."""
        return self.array.shape

    @property
    def dtype(self) -> Any:
        """The array's numpy dtype."""
        return self.array.dtype


@dataclasses.dataclass(frozen=True)
class OrbaxLeaf:
    """An array in a directory that Orbax wrote; it has not been read yet.

    Attributes:
        directory: directory with Orbax's tree.
        keys: key path in the tree.
        shape: shape of the array.
        dtype: dtype of the array.
    """

    directory: epath.Path
    keys: Keys
    shape: tuple[int, ...]
    dtype: Any


Leaf = HostLeaf | OrbaxLeaf
Weights = dict[str, Leaf]


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
    """Returns the leaves of a tree by path, with a prefix before each path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f'{prefix}{param_path(path)}': leaf for path, leaf in leaves}


def key_path(path: str) -> str:
    """Returns the path without its collection: 'Dense_0/kernel' for 'params/Dense_0/kernel'."""
    return path.partition('/')[2]


def with_key_path(path: str, new: str) -> str:
    """Returns a path with another key path in the same collection; a bare collection stays."""
    collection, slash, _ = path.partition('/')
    return f'{collection}/{new}' if slash else path


def is_slot(path: str) -> bool:
    """Whether the path is that of optimizer state."""
    return path.startswith('opt_state.')


def slots(optimizer_state: Mapping[str, Any], key_paths: Iterable[str]) -> dict[str, Any]:
    """Returns the slots of an optimizer, by paths such as 'opt_state.0.mu/Dense_0/kernel'.

    A count beside slots ('opt_state.0.count' of Adam) belongs to them. A count on its own is left
    out: that of a schedule is the position in its own run.

    Args:
        optimizer_state: leaves by path: 'opt_state/0/mu/Dense_0/kernel'.
        key_paths: key paths of the parameters: 'Dense_0/kernel'.
    """
    known, matched, rest = set(key_paths), {}, {}
    for path, leaf in optimizer_state.items():
        parts = path.split('/')
        # Where the slot ends and the key path of a parameter begins. optax nests states freely, so
        # only the end of a path can be compared.
        ends = (i for i in range(1, len(parts)) if '/'.join(parts[i:]) in known)
        end = next(ends, None)
        if end is None:
            rest['.'.join(parts)] = leaf
        else:
            matched[f'{".".join(parts[:end])}/{"/".join(parts[end:])}'] = leaf
    holders = {_holder(path) for path in matched}
    matched.update({name: leaf for name, leaf in rest.items() if _holder(name) in holders})
    return matched


def align_slots(weights: Weights, wanted: Collection[str]) -> Weights:
    """Returns the weights with their slots moved to the same slots of another optimizer.

    Clipping gradients or freezing parameters nests the same Adam differently. 'opt_state.0.mu' and
    'opt_state.inner_states.trained.inner_state.0.mu' count as the same slot of a parameter if
    neither optimizer has two slots of that name for it.

    Args:
        weights: arrays by key path.
        wanted: the paths of the model and its optimizer.
    """
    spare = [path for path in weights if is_slot(path) and path not in wanted]
    missing = [path for path in wanted if is_slot(path) and path not in weights]
    sources, goals = _group_by_slot_name(spare), _group_by_slot_name(missing)
    # The new path of each slot, and its old one. Ambiguous slots stay, and are reported as missing.
    new = {
        goals[key][0]: sources[key][0]
        for key in goals.keys() & sources.keys()
        if key[1] and len(goals[key]) == len(sources[key]) == 1
    }
    holders: dict[str, set[str]] = {}
    for path, old in new.items():
        holders.setdefault(_holder(path), set()).add(_holder(old))
    # Then the counts: from the state that all moved slots beside them came from.
    for path in missing:
        old_counts = {f'{holder}.{_slot_name(path)}' for holder in holders.get(_holder(path), ())}
        if not key_path(path) and len(old_counts) == 1 and old_counts <= weights.keys():
            new[path] = old_counts.pop()
    moved = set(new.values())
    kept = {path: leaf for path, leaf in weights.items() if path not in moved}
    return {**kept, **{path: weights[old] for path, old in new.items()}}


def _holder(path: str) -> str:
    """Returns the state that contains a slot: 'opt_state.0' for 'opt_state.0.mu/Dense_0/kernel'."""
    return path.partition('/')[0].rpartition('.')[0]


def _slot_name(path: str) -> str:
    return path.partition('/')[0].rpartition('.')[2]


def _group_by_slot_name(paths: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        groups.setdefault((_slot_name(path), key_path(path)), []).append(path)
    return groups


def from_arrays(tree: Any, prefix: str = '') -> Weights:
    """Returns the arrays of a tree as weights; arrays on several processes are gathered."""
    return {path: HostLeaf(_gather(x)) for path, x in flatten(tree, prefix).items()}


def read_array(leaf: Leaf) -> np.ndarray:
    """Returns a whole array."""
    return read_arrays({'': leaf})['']


def read_arrays(weights: Mapping[Any, Leaf]) -> dict[Any, np.ndarray]:
    """Returns whole arrays, by path."""
    loaded = {path: leaf.array for path, leaf in weights.items() if isinstance(leaf, HostLeaf)}
    # One restore per directory: Orbax reads its arrays concurrently.
    for directory, leaves in _group_by_directory(weights).items():
        import orbax.checkpoint as ocp

        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        arrays = read_orbax(directory, {leaf.keys: as_numpy for leaf in leaves.values()})
        loaded.update({path: arrays[leaf.keys] for path, leaf in leaves.items()})
    return {path: loaded[path] for path in weights}


def to_nested(weights: Weights) -> dict[str, Any]:
    """Returns all arrays as a nested dict, {'params': {'Dense_0': ...}, ...}."""
    return traverse_util.unflatten_dict(read_arrays(weights), sep='/')


def load(weights: Mapping[str, Leaf], wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns arrays on the devices, by path; each process reads only its shards.

    Args:
        weights: the arrays to load.
        wanted: arrays to read: for each of their paths the same shape, a dtype and a sharding.
    """
    leaves_on_host = {p: leaf for p, leaf in weights.items() if isinstance(leaf, HostLeaf)}
    loaded = {path: _put(leaf.array, wanted[path]) for path, leaf in leaves_on_host.items()}
    for directory, leaves in _group_by_directory(weights).items():
        goals = {leaf.keys: _restore_args(wanted[path]) for path, leaf in leaves.items()}
        arrays = read_orbax(directory, goals)
        for path, leaf in leaves.items():
            # `pop`: two paths may share an array of the file (a count for several slots), and each
            # needs its own buffer, because the state is donated.
            array, goal = arrays.pop(leaf.keys, None), wanted[path]
            loaded[path] = _put(read_array(leaf), goal) if array is None else array
    return {path: loaded[path] for path in weights}


def _gather(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.array(x)


def _group_by_directory(weights: Mapping[Any, Leaf]) -> dict[epath.Path, dict[Any, OrbaxLeaf]]:
    groups: dict[epath.Path, dict[Any, OrbaxLeaf]] = {}
    for path, leaf in weights.items():
        if isinstance(leaf, OrbaxLeaf):
            groups.setdefault(leaf.directory, {})[path] = leaf
    return groups


def _put(array: np.ndarray, wanted: Any) -> jax.Array:
    def read_shard(index: Any) -> np.ndarray:
        # A copy: JAX on CPU may use the given memory as its buffer, and the state is donated, so a
        # step would write into the caller's array.
        return np.array(array[index], dtype=wanted.dtype)

    return jax.make_array_from_callback(wanted.shape, wanted.sharding, read_shard)


def _restore_args(wanted: Any) -> Any:
    import orbax.checkpoint as ocp

    return ocp.ArrayRestoreArgs(
        sharding=wanted.sharding, global_shape=wanted.shape, dtype=wanted.dtype
    )


@contextlib.contextmanager
def orbax_handler(directory: epath.Path) -> Iterator[ocp.PyTreeCheckpointHandler]:
    """Yields Orbax's handler; errors of reading with it are raised as CheckpointError."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    try:
        yield handler
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # Out of memory: the checkpoint is not at fault.
    except Exception as error:
        raise CheckpointError(f'{directory} cannot be read: {first_line(error)}') from error
    finally:
        handler.close()


def read_orbax(directory: epath.Path, asked: Mapping[Keys, Any]) -> dict[Keys, Any]:
    """Returns some leaves of a directory; the others are not read.

    Args:
        directory: directory with Orbax's tree.
        asked: Orbax's restore arguments of the leaves to read, by key path.
    """
    import orbax.checkpoint as ocp

    def pick(path: tuple[Any, ...], _: Any) -> Any:
        return asked.get(path_names(path), ocp.PLACEHOLDER)

    with orbax_handler(directory) as handler:
        args = jax.tree_util.tree_map_with_path(pick, handler.metadata(directory).tree)
        # Orbax skips the placeholders in `item`. Its other leaves only mark what to read: type,
        # shape and sharding come from the restore arguments, which cannot be placeholders.
        skipped, anything = ocp.RestoreArgs(), jax.ShapeDtypeStruct((), jnp.float32)
        item = jax.tree.map(lambda x: x if x is ocp.PLACEHOLDER else anything, args)
        args = jax.tree.map(lambda x: skipped if x is ocp.PLACEHOLDER else x, args)
        wanted = ocp.args.PyTreeRestore(item=item, restore_args=args)
        restored = handler.restore(directory, args=wanted)
    restored_leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {path_names(path): x for path, x in restored_leaves if path_names(path) in asked}
