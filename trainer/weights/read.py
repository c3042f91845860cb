# SPDX-License-Identifier: Apache-2.0
"""Recognizes the format of a checkpoint or weight file, and opens it as a tree of arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import serialization
from flax.traverse_util import unflatten_dict

from trainer import compat
from trainer.checkpoint import empty
from trainer.checkpoint.errors import first_line
from trainer.checkpoint.manager import CheckpointError, Checkpoints
from trainer.checkpoint.retention import Retention, better_mode
from trainer.checkpoint.writing import step_directories
from trainer.config import places
from trainer.config.errors import UserError, indented_list
from trainer.modules.model_view import path_names
from trainer.weights import safetensors, torch_file
from trainer.weights.leaves import (
    HostLeaf,
    Leaf,
    OrbaxLeaf,
    orbax_handler,
    read_arrays,
    read_orbax,
)

Leaves = dict[tuple[str, ...], Leaf]
# The names of the item with the state in a step of an Orbax manager: ours, and Orbax's default.
_ITEMS = ('state', 'default')
# If an item has this name, all items of the step together are one training state.
_PARAMS = 'params'
_FILES = ('.safetensors', '.msgpack', '.pt', '.pth', '.bin', '.ckpt')
# The names that `flax.training.checkpoints` gives: a prefix and a step, which may be a float.
_FLAX = re.compile(r'(?P<prefix>.*_)(?P<step>-?[\d.]+(e[+-]?\d+)?)')


def open_tree(path: epath.PathLike, step: str | int = 'latest') -> Leaves:
    """Returns the arrays of a checkpoint by key path; those of Orbax are read later.

    Supported are work directories of this trainer; single checkpoints and directories of them, of
    this trainer, of Orbax's managers and checkpointers, and of `flax.training.checkpoints`; and
    msgpack files of Flax, safetensors files and PyTorch files.

    Args:
        path: a file or directory.
        step: 'latest', 'best' (for a work directory with `checkpoint.best`) or a number.

    Raises:
        UserError: if there is no such checkpoint, or no such step.
    """
    source = locate(epath.Path(path), str(step))
    if compat.is_orbax_array(source):
        return {(): HostLeaf(_read_array(source))}
    if source.is_dir():
        return {
            (*item, *keys): leaf
            for item, directory in _trees(source).items()
            for keys, leaf in _orbax_leaves(directory).items()
        }
    if source.suffix == '.safetensors':
        return _split_names(source, safetensors.read(source))
    if torch_file.is_torch_file(source):
        return _split_names(source, torch_file.read(source))
    tree = _read_msgpack(source)
    try:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
    except ValueError as error:  # JAX sorts the keys of a dict, and these cannot be compared.
        raise UserError(
            f'{source} does not contain a tree of arrays: {first_line(error)}'
        ) from error
    arrays = ((path, np.asarray(x)) for path, x in leaves if not isinstance(x, (str, bytes)))
    return {path_names(path): HostLeaf(x) for path, x in arrays}


def open_metadata(path: epath.PathLike, step: str | int = 'latest') -> dict[str, Any]:
    """Returns the metadata of a checkpoint of this trainer; {} for any other, and for a file.

    Args:
        path: as for `open_tree`.
        step: as for `open_tree`.
    """
    return _metadata(locate(epath.Path(path), str(step)))


def open_raw(path: epath.PathLike, step: str | int = 'latest') -> Any:
    """Returns everything in a checkpoint, as its library restores it without a target.

    Orbax returns lists for tuples and dicts for dataclasses, Flax returns dicts with the keys '0',
    '1'. Arrays are numpy arrays. Strings and empty containers are included.

    Args:
        path: as for `open_tree`.
        step: as for `open_tree`.
    """
    source = locate(epath.Path(path), str(step))
    if not source.is_dir():
        known = source.suffix == '.safetensors' or torch_file.is_torch_file(source)
        return unflatten_dict(read_arrays(open_tree(source))) if known else _read_msgpack(source)
    if compat.is_orbax_array(source):
        return _read_array(source)
    trees = {item: _read_raw(directory) for item, directory in _trees(source).items()}
    return trees[()] if () in trees else {item[0]: tree for item, tree in trees.items()}


def _read_raw(directory: epath.Path) -> Any:
    import orbax.checkpoint as ocp

    with orbax_handler(directory) as handler:
        args = jax.tree.map(
            lambda x: ocp.RestoreArgs(None if getattr(x, 'shape', None) is None else np.ndarray),
            handler.metadata(directory).tree,
        )
        return handler.restore(directory, args=ocp.args.PyTreeRestore(restore_args=args))


def open_texts(path: epath.PathLike, step: str | int = 'latest') -> dict[tuple[str, ...], str]:
    """Returns the strings of a checkpoint by key path.

    Args:
        path: as for `open_tree`.
        step: as for `open_tree`.
    """
    source = locate(epath.Path(path), str(step))
    if not source.is_dir():
        leaves = jax.tree_util.tree_leaves_with_path(open_raw(source))
        return {path_names(path): x for path, x in leaves if isinstance(x, str)}
    return {
        (*item, *keys): text
        for item, directory in _trees(source).items()
        for keys, text in _read_texts(directory).items()
    }


def _read_texts(directory: epath.Path) -> dict[tuple[str, ...], str]:
    with orbax_handler(directory) as handler:
        leaves = jax.tree_util.tree_leaves_with_path(handler.metadata(directory).tree)
    import orbax.checkpoint as ocp

    as_string = ocp.RestoreArgs(restore_type=str)
    keys = [path_names(p) for p, x in leaves if isinstance(x, ocp.metadata.StringMetadata)]
    return read_orbax(directory, dict.fromkeys(keys, as_string)) if keys else {}


def subtree(leaves: Leaves, at: str) -> Leaves:
    """Returns the arrays below a key path, by the rest of their key paths.

    Args:
        leaves: leaves of a file, by key path.
        at: the key path: 'model', 'state/ema'; '' for all.

    Raises:
        UserError: if there is nothing.
    """
    keys = tuple(filter(None, re.split('[./]', at)))
    selected = {path[len(keys) :]: x for path, x in leaves.items() if path[: len(keys)] == keys}
    if not selected:
        top = dict.fromkeys('/'.join(path[:2]) for path in leaves)
        raise UserError(
            f'nothing at {at!r} in the checkpoint, which contains\n{indented_list(top)}'
        )
    return selected


def locate(path: epath.Path, step: str = 'latest') -> epath.Path:
    """Returns the file with the arrays, or the directory with Orbax's tree or trees.

    Raises:
        UserError: if there is no checkpoint, or none of that step.
    """
    path = epath.Path(places.expand(path, 'config.init_from.path'))
    if not path.exists():
        raise UserError(f'{path}: no such file or directory')
    if '://' not in str(path):  # Orbax refuses relative paths.
        path = epath.Path(path).resolve()
    if not path.is_dir():
        return path
    if (path / 'checkpoints').is_dir():
        path = path / 'checkpoints'
    # A tree before steps: without OCDBT, Orbax makes a directory for each array, such as '0'.
    if tree := _tree_directory(path):
        return tree
    steps = _orbax_steps(path) or _flax_steps(path)
    chosen = _choose(path, steps, step) if steps else path
    if not chosen.is_dir():
        return chosen
    if tree := _tree_directory(chosen) or _single_item(chosen):
        return tree
    if not steps:
        files = [p.name for p in sorted(path.iterdir()) if p.suffix in _FILES and not p.is_dir()]
        raise UserError(
            f'no checkpoint in {path}: expected one of this trainer, of Orbax or of '
            'flax.training.checkpoints, or the path of a .msgpack or .safetensors file'
            + (f'; to load {", ".join(files[:5])}, add the file to the path' if files else '')
        )
    return chosen


def _tree_directory(path: epath.Path) -> epath.Path | None:
    """Returns the directory with Orbax's tree: this one, or the state in a manager's step."""
    return next(filter(compat.is_orbax_tree, (path, *(path / name for name in _ITEMS))), None)


def _tree_items(path: epath.Path) -> list[epath.Path]:
    """Returns the items of a manager's step that are trees, whatever their names."""
    return sorted(
        entry for entry in path.iterdir() if entry.is_dir() and compat.is_orbax_tree(entry)
    )


def _single_item(path: epath.Path) -> epath.Path | None:
    """Returns the only tree in a manager's step, or the step if its items are one state."""
    items = _tree_items(path)
    names = [entry.name for entry in items]
    if _PARAMS in names:
        return path if len(items) > 1 else items[0]
    if len(items) > 1:
        raise UserError(
            f'{path} contains several trees: add one of them to the path: {", ".join(names)}'
        )
    return items[0] if items else None


def _trees(path: epath.Path) -> dict[tuple[str, ...], epath.Path]:
    """Returns the directories of a tree, by the key path of each in it."""
    return (
        {(): path}
        if compat.is_orbax_tree(path)
        else {(entry.name,): entry for entry in _tree_items(path)}
    )


def _read_array(directory: epath.Path) -> np.ndarray:
    import orbax.checkpoint as ocp

    as_numpy = ocp.args.ArrayRestore(restore_args=ocp.RestoreArgs(restore_type=np.ndarray))
    return np.asarray(ocp.Checkpointer(ocp.ArrayCheckpointHandler()).restore(directory, as_numpy))


def _orbax_steps(path: epath.Path) -> dict[int, epath.Path]:
    """Returns the directories of steps; a manager of Orbax may pad their names with zeros."""
    names = (entry.name for entry in path.iterdir())
    padded = {int(name): path / name for name in names if name.isascii() and name.isdigit()}
    # Of '5' and '005' the former counts, as in the directories of this trainer.
    return {**padded, **dict(step_directories(path))}


def _flax_steps(path: epath.Path) -> dict[float, epath.Path]:
    steps = {}
    for entry in path.iterdir():
        match = _FLAX.fullmatch(entry.name)
        if match and not entry.name.endswith('tmp'):  # A save that did not finish.
            steps[float(match['step'])] = entry
    return steps


def _choose(path: epath.Path, steps: dict[Any, epath.Path], step: str) -> epath.Path:
    if step == 'latest':
        return steps[max(steps)]
    if step == 'best':
        return path / str(_best_step(path))
    try:
        return steps[float(step)]
    except (KeyError, ValueError):
        have = ', '.join(f'{s:g}' for s in sorted(steps))
        raise UserError(f'{path} has no checkpoint {step!r}; available: {have}') from None


def _best_step(path: epath.Path) -> int:
    """Returns the best step of one of our runs, by the metric in its own config."""
    checkpoints = Checkpoints(path, Retention())
    latest = checkpoints.latest()
    config = {} if latest is None else checkpoints.meta(latest).get('config', {})
    best = config.get('checkpoint', {}).get('best')
    if not best:
        raise UserError(
            f"{path}: step 'best' needs a run with config.checkpoint.best, and this run has none; "
            "set a step or 'latest'"
        )
    mode = best.get('mode') or better_mode(best['metric']) or 'max'
    retention = Retention(best_metric=best['metric'], best_mode=mode)
    best_step = Checkpoints(path, retention).best()
    if best_step is None:
        raise UserError(f'{path}: no checkpoint has the metric {best["metric"]!r}')
    return best_step


def _orbax_leaves(directory: epath.Path) -> Leaves:
    with orbax_handler(directory) as handler:
        stored = handler.metadata(directory).tree
    leaves = jax.tree_util.tree_leaves_with_path(stored)
    stored_leaves: Leaves = {
        path_names(path): OrbaxLeaf(directory, path_names(path), tuple(x.shape), x.dtype)
        for path, x in leaves
        if getattr(x, 'shape', None) is not None
    }
    return {**stored_leaves, **_empty_leaves(directory)}


def _empty_leaves(directory: epath.Path) -> Leaves:
    """Returns the empty arrays of a checkpoint of this trainer, which Orbax does not store."""
    try:
        empties = empty.from_metadata(_metadata(directory))
    except (ValueError, TypeError, AttributeError):
        return {}  # The metadata is not ours.
    return {keys: HostLeaf(np.zeros(x.shape, x.dtype)) for keys, x in empties.items()}


def _metadata(directory: epath.Path) -> dict[str, Any]:
    """Returns the metadata next to the state in a directory; {} if it is not of this trainer."""
    step = directory.parent
    if directory.name != 'state' or not step.name.isdigit():
        return {}
    try:
        return Checkpoints(step.parent, Retention()).meta(int(step.name))
    except CheckpointError:
        return {}


def _split_names(file: epath.Path, tensors: Mapping[str, np.ndarray]) -> Leaves:
    """Returns tensors by the parts of their names.

    Raises:
        UserError: if two names have the same parts, or one tensor would be inside another.
    """
    tree: Leaves = {}
    for name, x in tensors.items():
        keys = tuple(re.split('[./]', name))
        if keys in tree:
            raise UserError(f'{file}: two tensors have the name {"/".join(keys)!r}')
        tree[keys] = HostLeaf(x)
    for keys in tree:
        outer = next((keys[:i] for i in range(1, len(keys)) if keys[:i] in tree), None)
        if outer:
            names = '/'.join(outer), '/'.join(keys)
            raise UserError(f'{file}: {names[1]!r} is below {names[0]!r}, which is a tensor too')
    return tree


def _read_msgpack(file: epath.Path) -> Any:
    try:
        return serialization.msgpack_restore(file.read_bytes())
    except Exception as error:
        raise UserError(
            f'{file} is not a msgpack file of Flax ({type(error).__name__}: {error}); expected '
            'such a file, a safetensors file (*.safetensors), a PyTorch file or a directory of '
            'checkpoints'
        ) from error
