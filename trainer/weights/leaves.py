# SPDX-License-Identifier: Apache-2.0
"""Arrays by path, on the disk or in memory, and their way onto the devices.

A path is a collection and the place in it: 'params/Dense_0/kernel', 'batch_stats/BatchNorm_0/mean'.
What an optimizer holds for each parameter is a collection too: 'opt_state.0.mu/Dense_0/kernel'.
Nothing is read before it is needed.
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
from trainer.modules.model_view import param_path

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Keys = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class HostLeaf:
    """An array of this process; a view of a file is read where it is sliced."""

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
    """An array that lies in a directory that Orbax wrote, at a path of keys."""

    directory: epath.Path
    keys: Keys
    shape: tuple[int, ...]
    dtype: Any


Leaf = HostLeaf | OrbaxLeaf
Weights = dict[str, Leaf]


def flat(tree: Any, prefix: str = '') -> dict[str, Any]:
    """Returns the leaves of a tree by path, each with the prefix before it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f'{prefix}{param_path(path)}': leaf for path, leaf in leaves}


def place(path: str) -> str:
    """Returns the path without its collection: 'Dense_0/kernel' for 'params/Dense_0/kernel'."""
    return path.partition('/')[2]


def replace_place(path: str, new: str) -> str:
    """Returns the path of another place in the same collection; without a place it stays."""
    collection, slash, _ = path.partition('/')
    return f'{collection}/{new}' if slash else path


def is_slot(path: str) -> bool:
    """Whether the path is of something that an optimizer holds."""
    return path.startswith('opt_state.')


def slots(optimizer_state: Mapping[str, Any], places: Iterable[str]) -> dict[str, Any]:
    """Returns what an optimizer holds for parameters, by slot and place.

    A number that stands beside such slots ('opt_state.0.count' of Adam) belongs to them; one that
    stands alone does not: a schedule's count is that of its run.

    Args:
        optimizer_state: leaves by path: 'opt_state/0/mu/Dense_0/kernel'.
        places: of the parameters: 'Dense_0/kernel'.
    """
    known, found, rest = set(places), {}, {}
    for path, leaf in optimizer_state.items():
        parts = path.split('/')
        ends = (i for i in range(1, len(parts)) if '/'.join(parts[i:]) in known)
        end = next(ends, None)
        if end is None:
            rest['.'.join(parts)] = leaf
        else:
            found[f'{".".join(parts[:end])}/{"/".join(parts[end:])}'] = leaf
    holders = {_holder(path) for path in found}
    found.update({name: leaf for name, leaf in rest.items() if _holder(name) in holders})
    return found


def in_slots_of(weights: Weights, wanted: Collection[str]) -> Weights:
    """Returns the weights with the slots of an optimizer that is nested in another way.

    Gradients that are clipped and parameters that are frozen put the same Adam into other tuples:
    'opt_state.0.mu' and 'opt_state.inner_states.trained.inner_state.0.mu' are one slot of a
    parameter if neither optimizer has two of that name for it.

    Args:
        weights: what there is.
        wanted: the paths of the model and its optimizer.
    """
    spare = [path for path in weights if is_slot(path) and path not in wanted]
    missing = [path for path in wanted if is_slot(path) and path not in weights]
    there, here = _by_slot_name(spare), _by_slot_name(missing)
    new = {
        here[key][0]: there[key][0]
        for key in here.keys() & there.keys()
        if key[1] and len(here[key]) == len(there[key]) == 1
    }
    holders: dict[str, set[str]] = {}
    for path, old in new.items():
        holders.setdefault(_holder(path), set()).add(_holder(old))
    for path in missing:  # Numbers beside slots come from where these come from.
        found = {f'{holder}.{_slot_name(path)}' for holder in holders.get(_holder(path), ())}
        if not place(path) and len(found) == 1 and found <= weights.keys():
            new[path] = found.pop()
    moved = set(new.values())
    kept = {path: leaf for path, leaf in weights.items() if path not in moved}
    return {**kept, **{path: weights[old] for path, old in new.items()}}


def _holder(path: str) -> str:
    """Returns the tuple that has a slot: 'opt_state.0' of 'opt_state.0.mu/Dense_0/kernel'."""
    return path.partition('/')[0].rpartition('.')[0]


def _slot_name(path: str) -> str:
    return path.partition('/')[0].rpartition('.')[2]


def _by_slot_name(paths: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        found.setdefault((_slot_name(path), place(path)), []).append(path)
    return found


def of_arrays(tree: Any, prefix: str = '') -> Weights:
    """Returns the weights of a tree of arrays; ones that are spread over processes are gathered."""
    return {path: HostLeaf(_gathered(x)) for path, x in flat(tree, prefix).items()}


def host(leaf: Leaf) -> np.ndarray:
    """Returns the whole array of a leaf."""
    return hosts({'': leaf})['']


def hosts(weights: Mapping[Any, Leaf]) -> dict[Any, np.ndarray]:
    """Returns the whole arrays of leaves, those of a directory read together."""
    found = {path: leaf.array for path, leaf in weights.items() if isinstance(leaf, HostLeaf)}
    for directory, leaves in _by_directory(weights).items():
        import orbax.checkpoint as ocp

        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        arrays = read_orbax(directory, {leaf.keys: as_numpy for leaf in leaves.values()})
        found.update({path: arrays[leaf.keys] for path, leaf in leaves.items()})
    return {path: found[path] for path in weights}


def nested(weights: Weights) -> dict[str, Any]:
    """Returns all arrays as a nested dict, {'params': {'Dense_0': ...}, ...}."""
    return traverse_util.unflatten_dict(hosts(weights), sep='/')


def load(weights: Mapping[str, Leaf], wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the arrays by path, each device reading the part that it holds.

    Args:
        weights: where each array is.
        wanted: for each of their paths the same shape, a dtype and a sharding.
    """
    leaves_on_host = {p: leaf for p, leaf in weights.items() if isinstance(leaf, HostLeaf)}
    loaded = {path: _put(leaf.array, wanted[path]) for path, leaf in leaves_on_host.items()}
    for directory, leaves in _by_directory(weights).items():
        # Two paths may share an array of the file; they get buffers of their own.
        goals = {leaf.keys: _as_wanted(wanted[path]) for path, leaf in leaves.items()}
        found = read_orbax(directory, goals)
        for path, leaf in leaves.items():
            array, goal = found.pop(leaf.keys, None), wanted[path]
            loaded[path] = _put(host(leaf), goal) if array is None else array
    return {path: loaded[path] for path in weights}


def _gathered(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.array(x)


def _by_directory(weights: Mapping[Any, Leaf]) -> dict[epath.Path, dict[Any, OrbaxLeaf]]:
    found: dict[epath.Path, dict[Any, OrbaxLeaf]] = {}
    for path, leaf in weights.items():
        if isinstance(leaf, OrbaxLeaf):
            found.setdefault(leaf.directory, {})[path] = leaf
    return found


def _put(array: np.ndarray, wanted: Any) -> jax.Array:
    def piece(index: Any) -> np.ndarray:
        # A copy: the state is donated, and a device may work in the very memory that it was given.
        return np.array(array[index], dtype=wanted.dtype)

    return jax.make_array_from_callback(wanted.shape, wanted.sharding, piece)


def _as_wanted(wanted: Any) -> Any:
    import orbax.checkpoint as ocp

    return ocp.ArrayRestoreArgs(
        sharding=wanted.sharding, global_shape=wanted.shape, dtype=wanted.dtype
    )


@contextlib.contextmanager
def reading(directory: epath.Path) -> Iterator[ocp.PyTreeCheckpointHandler]:
    """Yields Orbax's handler; what cannot be read with it is a CheckpointError."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    try:
        yield handler
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise CheckpointError(f'{directory} cannot be read: {first_line(error)}') from error
    finally:
        handler.close()


def read_orbax(directory: epath.Path, asked: Mapping[Keys, Any]) -> dict[Keys, Any]:
    """Returns some leaves of a directory, restored by Orbax's arguments; others are not read."""
    import orbax.checkpoint as ocp

    def pick(path: tuple[Any, ...], _: Any) -> Any:
        return asked.get(keys_of(path), ocp.PLACEHOLDER)

    with reading(directory) as handler:
        args = jax.tree_util.tree_map_with_path(pick, handler.metadata(directory).tree)
        skipped, anything = ocp.RestoreArgs(), jax.ShapeDtypeStruct((), jnp.float32)
        item = jax.tree.map(lambda x: x if x is ocp.PLACEHOLDER else anything, args)
        args = jax.tree.map(lambda x: skipped if x is ocp.PLACEHOLDER else x, args)
        wanted = ocp.args.PyTreeRestore(item=item, restore_args=args)
        restored = handler.restore(directory, args=wanted)
    found = jax.tree_util.tree_leaves_with_path(restored)
    return {keys_of(path): x for path, x in found if keys_of(path) in asked}


def keys_of(path: tuple[Any, ...]) -> Keys:
    """Returns the key path of a leaf as strings."""
    return tuple(param_path((key,)) for key in path)
