# SPDX-License-Identifier: Apache-2.0
"""Finds out what lies at a path, and returns the tree that is in it."""

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
from trainer.config.errors import UserError
from trainer.config.text import indented_list
from trainer.weights import safetensors, torch_file
from trainer.weights.leaves import (
    HostLeaf,
    Leaf,
    OrbaxLeaf,
    hosts,
    keys_of,
    read_orbax,
    reading,
)

Leaves = dict[tuple[str, ...], Leaf]
# The names of the trees in a step of an Orbax manager.
_ITEMS = ('state', 'default')
# The name of one that makes a training state together with the others.
_PARAMS = 'params'
_FILES = ('.safetensors', '.msgpack', '.pt', '.pth', '.bin', '.ckpt')
# How `flax.training.checkpoints` names its files: a prefix and a number.
_FLAX = re.compile(r'(?P<prefix>.*_)(?P<step>-?[\d.]+(e[+-]?\d+)?)')


def open_tree(path: epath.PathLike, step: str | int = 'latest') -> Leaves:
    """Returns the arrays of a checkpoint by their paths of keys; none is read yet.

    Known are a work directory of ours, a directory of checkpoints or a single one, ours or those
    of Orbax's managers and checkpointers; directories of `flax.training.checkpoints`; files of
    Flax's msgpack and safetensors files.

    Args:
        path: a file or directory.
        step: 'latest', 'best' (of a work directory with `checkpoint.best`) or a number.

    Raises:
        UserError: if nothing of the kind lies there, or not that step.
    """
    found = locate(epath.Path(path), str(step))
    if compat.is_orbax_array(found):
        return {(): HostLeaf(_array(found))}
    if found.is_dir():
        return {
            (*item, *keys): leaf
            for item, directory in _trees(found).items()
            for keys, leaf in _orbax(directory).items()
        }
    if found.suffix == '.safetensors':
        return _by_keys(found, safetensors.read(found))
    if torch_file.is_one(found):
        return _by_keys(found, torch_file.read(found))
    tree = _msgpack(found)
    try:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
    except ValueError as error:  # Keys that cannot be put into an order.
        raise UserError(f'{found} holds no tree of arrays: {first_line(error)}') from error
    numbers = ((path, np.asarray(x)) for path, x in leaves if not isinstance(x, (str, bytes)))
    return {keys_of(path): HostLeaf(x) for path, x in numbers}


def open_raw(path: epath.PathLike, step: str | int = 'latest') -> Any:
    """Returns everything in a checkpoint as its library reads it without a target.

    Orbax gives lists for tuples and dicts for dataclasses, Flax dicts with '0', '1' as keys; arrays
    are numpy's, and text and empty containers are there too.

    Args:
        path: as `open_tree` takes it.
        step: as `open_tree` takes it.
    """
    found = locate(epath.Path(path), str(step))
    if not found.is_dir():
        known = found.suffix == '.safetensors' or torch_file.is_one(found)
        return unflatten_dict(hosts(open_tree(found))) if known else _msgpack(found)
    if compat.is_orbax_array(found):
        return _array(found)
    trees = {item: _raw(directory) for item, directory in _trees(found).items()}
    return trees[()] if () in trees else {item[0]: tree for item, tree in trees.items()}


def _raw(directory: epath.Path) -> Any:
    import orbax.checkpoint as ocp

    with reading(directory) as handler:
        args = jax.tree.map(
            lambda x: ocp.RestoreArgs(None if getattr(x, 'shape', None) is None else np.ndarray),
            handler.metadata(directory).tree,
        )
        return handler.restore(directory, args=ocp.args.PyTreeRestore(restore_args=args))


def open_texts(path: epath.PathLike, step: str | int = 'latest') -> dict[tuple[str, ...], str]:
    """Returns the texts of a checkpoint by their paths of keys.

    Args:
        path: as `open_tree` takes it.
        step: as `open_tree` takes it.
    """
    found = locate(epath.Path(path), str(step))
    if not found.is_dir():
        leaves = jax.tree_util.tree_leaves_with_path(open_raw(found))
        return {keys_of(path): x for path, x in leaves if isinstance(x, str)}
    return {
        (*item, *keys): text
        for item, directory in _trees(found).items()
        for keys, text in _texts(directory).items()
    }


def _texts(directory: epath.Path) -> dict[tuple[str, ...], str]:
    with reading(directory) as handler:
        leaves = jax.tree_util.tree_leaves_with_path(handler.metadata(directory).tree)
    import orbax.checkpoint as ocp

    as_text = ocp.RestoreArgs(restore_type=str)
    texts = [keys_of(p) for p, x in leaves if isinstance(x, ocp.metadata.StringMetadata)]
    return read_orbax(directory, dict.fromkeys(texts, as_text)) if texts else {}


def below(leaves: Leaves, at: str) -> Leaves:
    """Returns the arrays below a path ('model', 'state/ema'; '' for all), by the rest of theirs.

    Raises:
        UserError: if nothing is there.
    """
    keys = tuple(filter(None, re.split('[./]', at)))
    found = {path[len(keys) :]: x for path, x in leaves.items() if path[: len(keys)] == keys}
    if not found:
        top = dict.fromkeys('/'.join(path[:2]) for path in leaves)
        raise UserError(f'nothing is at {at!r} in the checkpoint; it holds\n{indented_list(top)}')
    return found


def locate(path: epath.Path, step: str = 'latest') -> epath.Path:
    """Returns the file, or the directory with Orbax's tree or trees, that holds the arrays.

    Raises:
        UserError: if there is none, or none of that step.
    """
    path = epath.Path(places.expand(path, 'config.init_from.path'))
    if not path.exists():
        raise UserError(f'{path}: there is no such file or directory')
    if '://' not in str(path):
        path = epath.Path(path).resolve()
    if not path.is_dir():
        return path
    if (path / 'checkpoints').is_dir():
        path = path / 'checkpoints'
    if tree := _tree_directory(path):
        return tree
    steps = _orbax_steps(path) or _flax_steps(path)
    chosen = _choose(path, steps, step) if steps else path
    if not chosen.is_dir():
        return chosen
    if tree := _tree_directory(chosen) or _item(chosen):
        return tree
    if not steps:
        files = [p.name for p in sorted(path.iterdir()) if p.suffix in _FILES and not p.is_dir()]
        raise UserError(
            f'{path} holds no checkpoint: expected one of this trainer or of Orbax, files of '
            'flax.training.checkpoints, or the name of a .msgpack or .safetensors file'
            + (f'; there is {", ".join(files[:5])}: name it in the path' if files else '')
        )
    return chosen


def _tree_directory(path: epath.Path) -> epath.Path | None:
    """Returns the directory of Orbax's tree: this one, or an item of a manager's step."""
    return next(filter(compat.is_orbax_tree, (path, *(path / name for name in _ITEMS))), None)


def _items(path: epath.Path) -> list[epath.Path]:
    """Returns the trees among the items of a manager's step, which may have any names."""
    return sorted(
        entry for entry in path.iterdir() if entry.is_dir() and compat.is_orbax_tree(entry)
    )


def _item(path: epath.Path) -> epath.Path | None:
    """Returns the only tree of a manager's step, or the step if its items make one together."""
    found = _items(path)
    names = [entry.name for entry in found]
    if _PARAMS in names:
        return path if len(found) > 1 else found[0]
    if len(found) > 1:
        raise UserError(
            f'{path} holds several trees: name one of them in the path: {", ".join(names)}'
        )
    return found[0] if found else None


def _trees(path: epath.Path) -> dict[tuple[str, ...], epath.Path]:
    """Returns the directories that make a tree, by the keys below which each is."""
    return (
        {(): path}
        if compat.is_orbax_tree(path)
        else {(entry.name,): entry for entry in _items(path)}
    )


def _array(directory: epath.Path) -> np.ndarray:
    import orbax.checkpoint as ocp

    as_numpy = ocp.args.ArrayRestore(restore_args=ocp.RestoreArgs(restore_type=np.ndarray))
    return np.asarray(ocp.Checkpointer(ocp.ArrayCheckpointHandler()).restore(directory, as_numpy))


def _orbax_steps(path: epath.Path) -> dict[int, epath.Path]:
    """Returns the steps of ours or of a manager's, which may fill up its numbers with zeros."""
    names = (entry.name for entry in path.iterdir())
    found = {int(name): path / name for name in names if name.isascii() and name.isdigit()}
    return {**found, **dict(step_directories(path))}


def _flax_steps(path: epath.Path) -> dict[float, epath.Path]:
    found = {}
    for entry in path.iterdir():
        match = _FLAX.fullmatch(entry.name)
        if match and not entry.name.endswith('tmp'):
            found[float(match['step'])] = entry
    return found


def _choose(path: epath.Path, steps: dict[Any, epath.Path], step: str) -> epath.Path:
    if step == 'latest':
        return steps[max(steps)]
    if step == 'best':
        return path / str(_best(path))
    try:
        return steps[float(step)]
    except (KeyError, ValueError):
        have = ', '.join(f'{s:g}' for s in sorted(steps))
        raise UserError(f'{path} has no checkpoint {step!r}; there: {have}') from None


def _best(path: epath.Path) -> int:
    """Returns the best step of one of our runs, as its own config tells it."""
    checkpoints = Checkpoints(path, Retention())
    latest = checkpoints.latest()
    config = {} if latest is None else checkpoints.meta(latest).get('config', {})
    best = config.get('checkpoint', {}).get('best')
    if not best:
        raise UserError(
            f"{path}: step 'best' needs the run's checkpoint.best, and that run has none; name a "
            "step, or 'latest'"
        )
    mode = best.get('mode') or better_mode(best['metric']) or 'max'
    retention = Retention(best_metric=best['metric'], best_mode=mode)
    found = Checkpoints(path, retention).best()
    if found is None:
        raise UserError(f'{path}: no checkpoint there has the metric {best["metric"]!r}')
    return found


def _orbax(directory: epath.Path) -> Leaves:
    with reading(directory) as handler:
        stored = handler.metadata(directory).tree
    leaves = jax.tree_util.tree_leaves_with_path(stored)
    found: Leaves = {
        keys_of(path): OrbaxLeaf(directory, keys_of(path), tuple(x.shape), x.dtype)
        for path, x in leaves
        if getattr(x, 'shape', None) is not None
    }
    return {**found, **_without_elements(directory)}


def _without_elements(directory: epath.Path) -> Leaves:
    """Returns the arrays that Orbax does not store, as listed in our own checkpoints."""
    step = directory.parent
    if directory.name != 'state' or not step.name.isdigit():
        return {}
    try:
        meta = Checkpoints(step.parent, Retention()).meta(int(step.name))
        empties = empty.stored(meta)
    except (CheckpointError, ValueError, TypeError, AttributeError):
        return {}  # Written by another program.
    return {keys: HostLeaf(np.zeros(x.shape, x.dtype)) for keys, x in empties.items()}


def _by_keys(file: epath.Path, tensors: Mapping[str, np.ndarray]) -> Leaves:
    """Returns tensors by the parts of their names.

    Raises:
        UserError: if two have one name, or one has the name of what another is in.
    """
    found: Leaves = {}
    for name, x in tensors.items():
        keys = tuple(re.split('[./]', name))
        if keys in found:
            raise UserError(f'{file}: two tensors are named {"/".join(keys)!r}')
        found[keys] = HostLeaf(x)
    for keys in found:
        outer = next((keys[:i] for i in range(1, len(keys)) if keys[:i] in found), None)
        if outer:
            names = '/'.join(outer), '/'.join(keys)
            raise UserError(f'{file}: {names[0]!r} is a tensor, and {names[1]!r} is inside it')
    return found


def _msgpack(file: epath.Path) -> Any:
    try:
        return serialization.msgpack_restore(file.read_bytes())
    except Exception as error:
        raise UserError(
            f'{file} is no msgpack file of Flax ({type(error).__name__}: {error}); known are '
            'these, safetensors files (named *.safetensors), files of PyTorch and directories of '
            'checkpoints'
        ) from error
