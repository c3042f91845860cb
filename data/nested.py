# SPDX-License-Identifier: Apache-2.0
"""Nested examples and batches: trees of dicts, lists, tuples, NamedTuples and None with arrays.

An array is named by its path: 'inputs/x', 'pair/0', and 'graph/nodes' for a field of a NamedTuple.
A list or a tuple without arrays, such as one of numbers, is not a node of the tree but a value:
`np.asarray` makes an array of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# A batch or an example: a dict of arrays, or another tree of them.
Tree = Any

_SCALARS = (bool, int, float, complex, str, bytes, np.generic)


class StructureError(ValueError):
    """Two trees differ in structure.

    Attributes:
        position: index, among the other trees, of the one that differs from the first.
        difference: what differs, such as "'inputs' has the keys x, not x, z".
    """

    def __init__(self, position: int, difference: str):
        super().__init__(difference)
        self.position = position
        self.difference = difference


def is_node(value: Any) -> bool:
    """Whether a value is a dict, None, a NamedTuple, or a list or tuple with arrays in it."""
    if isinstance(value, np.ndarray):
        return False
    if isinstance(value, list | tuple):
        return hasattr(value, '_fields') or _has_arrays(value)
    return value is None or isinstance(value, dict | Mapping)


def _has_arrays(value: Any) -> bool:
    # By the types that occur, because a list of tokens may be long.
    if all(issubclass(kind, _SCALARS) for kind in set(map(type, value))):
        return False
    return any(is_node(x) or (hasattr(x, 'shape') and not isinstance(x, np.generic)) for x in value)


def is_flat(batch: Any) -> bool:
    """Whether a batch is a dict of arrays, with no node below it."""
    return isinstance(batch, Mapping) and not any(map(is_node, batch.values()))


def map_arrays(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Returns the tree of `fn(array, *arrays at the same place of the others)`.

    Args:
        fn: called once for each array.
        tree: an example or a batch; at its top, a list or a tuple of numbers is a node too.
        *rest: other trees with the structure of `tree`.

    Raises:
        StructureError: if one of the others has another structure.
    """
    if not rest and _is_plain(tree):
        return {name: fn(x) for name, x in tree.items()}
    return map_named(lambda _, *arrays: fn(*arrays), tree, *rest)


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Like `map_arrays`, for `fn(name, array, *arrays of the others)`."""
    if not rest and _is_plain(tree):
        return {name: fn(name, x) for name, x in tree.items()}
    return _map(fn, '', tree, rest, at_node=isinstance(tree, list | tuple) or is_node(tree))


def _is_plain(tree: Any) -> bool:
    """Whether a tree is a dict of numpy arrays: a common case, which costs little here."""
    return type(tree) is dict and {np.ndarray}.issuperset(map(type, tree.values()))


def _map(
    fn: Callable[..., Any], path: str, tree: Any, rest: tuple[Any, ...], *, at_node: bool
) -> Any:
    if not at_node:
        for position, other in enumerate(rest):
            if is_node(other):
                raise StructureError(position, f'{path!r} is {_kind(other)}, not an array')
        return fn(path, tree, *rest)
    for position, other in enumerate(rest):
        _check_same(path, tree, other, position)
    parts = []
    for key, value in _items(tree):
        others = tuple(_child(other, key) for other in rest)
        name = key if not path and isinstance(key, str) else join_path(path, key)
        parts.append((key, _map(fn, name, value, others, at_node=is_node(value))))
    return _rebuild(tree, parts)


def leaves_with_names(tree: Any) -> dict[str, Any]:
    """Returns the arrays of a tree by their paths.

    Raises:
        ValueError: if two arrays have the same path, because a key has a '/' in it.
    """
    if is_flat(tree):
        return dict(tree)
    leaves: dict[str, Any] = {}

    def add(name: str, leaf: Any) -> None:
        if name in leaves:
            raise ValueError(
                f'two arrays of an example are named {name!r}: a key with a slash in it, and a '
                'path of keys; rename the key'
            )
        leaves[name] = leaf

    map_named(add, tree)
    return leaves


def paths_of_none(tree: Any) -> set[str]:
    """Returns the paths at which a tree has None."""
    paths = set()

    def visit(path: str, node: Any) -> None:
        if node is None:
            paths.add(path)
        elif is_node(node) or not path:
            for key, value in _items(node):
                visit(join_path(path, key), value)

    visit('', tree)
    return paths


def take_row(batch: Any, row: int) -> Any:
    """Returns one example of a batch (n, ...).

    A number is a numpy scalar in a flat dict, and an array () in another tree: a list of scalars
    would be one value, so the example would have another structure than its batch.
    """
    if is_flat(batch):
        return {name: x[row] for name, x in batch.items()}
    return map_arrays(lambda x: x[row, ...], batch)


def first_array(tree: Any) -> Any:
    """Returns the first array of a tree."""
    return next(iter(leaves_with_names(tree).values()))


def has_field(batch: Any, path: str) -> bool:
    """Whether a tree has an array, or a node, at a path."""
    found, _ = _find(batch, path)
    return found


def get_field(batch: Any, path: str) -> Any:
    """Returns what a tree has at a path: an array, or a node with all that is below it.

    Args:
        batch: the tree.
        path: such as 'image', 'inputs/x' or '0'.

    Raises:
        KeyError: if there is nothing, naming what there is.
    """
    if type(batch) is dict and path in batch:
        return batch[path]
    found, value = _find(batch, path)
    if not found:
        raise KeyError(f'{path!r}; the batch has {", ".join(leaves_with_names(batch))}')
    return value


def with_field(batch: Any, path: str, value: Any) -> Any:
    """Returns a tree with another value at a path; the rest is shared with `batch`.

    Args:
        batch: the tree.
        path: of something that it has, or a new key of a dict in it.
        value: an array, or a node.

    Raises:
        KeyError: if a tuple or a list on the way has no such place.
    """
    if type(batch) is dict and path in batch:
        return {**batch, path: value}
    for key, rest in _splits(batch, path):
        new = value if rest is None else with_field(_child(batch, key), rest, value)
        return _rebuild(batch, [(k, new if k == key else x) for k, x in _items(batch)])
    if isinstance(batch, Mapping):
        return {**batch, path: value}
    raise KeyError(f'{path!r}: {_kind(batch)} has no such place')


def without_field(batch: Any, path: str) -> Any:
    """Returns a tree without what it has at a path, which must be in dicts."""
    for key, rest in _splits(batch, path):
        if rest is not None:
            return with_field(batch, str(key), without_field(_child(batch, key), rest))
        if isinstance(batch, Mapping):
            return {k: x for k, x in batch.items() if k != key}
    raise KeyError(f'{path!r}: {_kind(batch)} has no such field that could be left out')


def keep_fields(batch: Any, paths: Sequence[str]) -> Any:
    """Returns a tree with only what it has at some paths, which must be in dicts.

    Raises:
        KeyError: if there is nothing at one of them, naming what there is.
    """
    kept: dict[Any, Any] = {}
    below: dict[Any, list[str]] = {}
    for path in paths:
        get_field(batch, path)
        if not isinstance(batch, Mapping):
            raise KeyError(f'{path!r}: {_kind(batch)} has no fields that could be left out')
        key, rest = next(_splits(batch, path))
        kept[key] = batch[key]
        if rest is not None:
            below.setdefault(key, []).append(rest)
    return {**kept, **{key: keep_fields(batch[key], rests) for key, rests in below.items()}}


def join_path(path: str, key: Any) -> str:
    """Returns the path of an item below a path; that of the top is ''."""
    return f'{path}/{key}' if path else str(key)


def _find(batch: Any, path: str) -> tuple[bool, Any]:
    for key, rest in _splits(batch, path):
        child = _child(batch, key)
        if rest is None:
            return True, child
        found, value = _find(child, rest)
        if found:
            return True, value
    return False, None


def _splits(batch: Any, path: str) -> Iterator[tuple[Any, str | None]]:
    """Yields the keys of a node that a path begins with, each with the rest of the path.

    First the key that is the whole path, if there is one: a key may have slashes.
    """
    if not is_node(batch) and not isinstance(batch, list | tuple):
        return
    items = _items(batch)
    yield from ((key, None) for key, _ in items if str(key) == path)
    for key, value in items:
        if path.startswith(f'{key}/') and is_node(value):
            yield key, path[len(f'{key}/') :]


def _items(tree: Any) -> list[tuple[Any, Any]]:
    if tree is None:
        return []
    if isinstance(tree, Mapping):
        return list(tree.items())
    return list(zip(_keys(tree), tree, strict=True))


def _keys(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return tree.keys()
    return getattr(tree, '_fields', range(len(tree)))


def _child(tree: Any, key: Any) -> Any:
    return tree[key] if isinstance(tree, Mapping) or isinstance(key, int) else getattr(tree, key)


def _rebuild(tree: Any, parts: list[tuple[Any, Any]]) -> Any:
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return dict(parts)
    values = [value for _, value in parts]
    if hasattr(tree, '_fields'):
        return type(tree)(*values)
    return values if isinstance(tree, list) else tuple(values)


def _check_same(path: str, tree: Any, other: Any, position: int) -> None:
    where = repr(path) if path else 'it'
    if _kind(tree) != _kind(other):
        raise StructureError(position, f'{where} is {_kind(other)}, not {_kind(tree)}')
    if tree is None or _keys(tree) == _keys(other):
        return
    if isinstance(tree, Mapping):
        mine, theirs = (', '.join(sorted(map(str, each))) for each in (tree, other))
        raise StructureError(position, f'{where} has the keys {theirs}, not {mine}')
    raise StructureError(position, f'{where} has {len(other)} items, not {len(tree)}')


def _kind(value: Any) -> str:
    if value is None:
        return 'None'
    if isinstance(value, Mapping):
        return 'a dict'
    if hasattr(value, '_fields'):
        return f'a {type(value).__name__}'
    for kind, name in ((list, 'a list'), (tuple, 'a tuple')):
        if isinstance(value, kind):
            return name
    return 'an array'
