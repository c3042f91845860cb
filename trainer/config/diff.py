# SPDX-License-Identifier: Apache-2.0
"""Compares plain configs, and converts them to and from JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.config.columns import align_columns
from trainer.config.errors import short_repr

ABSENT = '(absent)'


@dataclasses.dataclass(frozen=True)
class Change:
    """A difference between two configs.

    Attributes:
        path: 'optimizer.learning_rate'.
        old: the old value, ABSENT if there was none.
        new: the new value, ABSENT if there is none.
    """

    path: str
    old: Any
    new: Any


def diff(old: Any, new: Any) -> list[Change]:
    """Returns the differences between two plain configs, in the order of their keys."""
    return list(_changes(old, new, ''))


def format_diff(changes: Sequence[Change]) -> str:
    """Returns one line per change, with aligned values."""
    lines = align_columns([(c.path, f'{c.old!r} -> {c.new!r}') for c in changes])
    return '\n'.join(f'  {line}' for line in lines)


def to_jsonable(node: Any) -> Any:
    """Returns a plain config as JSON values.

    A tuple becomes {'__tuple__': [...]}, because JSON has lists only, and keys become strings.
    """
    if isinstance(node, Mapping):
        return {str(key): to_jsonable(value) for key, value in node.items()}
    if isinstance(node, tuple):
        return {'__tuple__': [to_jsonable(value) for value in node]}
    if isinstance(node, list):
        return [to_jsonable(value) for value in node]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f'expected a dict, tuple, list, number, string or None, got {node!r}')


def from_jsonable(node: Any) -> Any:
    """Returns the config for JSON values, the inverse of `to_jsonable` (except for keys).

    Raises:
        ValueError: if the value of '__tuple__' is not a list, in a damaged file.
    """
    if isinstance(node, Mapping):
        if set(node) == {'__tuple__'}:
            if not isinstance(node['__tuple__'], list):
                raise ValueError(
                    f'"__tuple__" is {short_repr(node["__tuple__"], limit=40)}, not a list'
                )
            return tuple(from_jsonable(value) for value in node['__tuple__'])
        return {key: from_jsonable(value) for key, value in node.items()}
    if isinstance(node, list):
        return [from_jsonable(value) for value in node]
    return node


def _changes(old: Any, new: Any, path: str) -> Iterator[Change]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        # Keys are compared as strings: {1000: 0.1} was saved as {'1000': 0.1}.
        old, new = ({str(k): v for k, v in node.items()} for node in (old, new))
        for key in dict.fromkeys([*old, *new]):
            where = f'{path}.{key}' if path else key
            yield from _changes(old.get(key, ABSENT), new.get(key, ABSENT), where)
    elif _have_same_length(old, new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _changes(a, b, f'{path}[{index}]')
    # The types too, because 1 == 1.0 == True in Python.
    elif type(old) is not type(new) or (old != new and not _are_both_nan(old, new)):
        yield Change(path, old, new)


def _are_both_nan(old: Any, new: Any) -> bool:
    return old != old and new != new  # NaN is the only value that is not equal to itself.


def _have_same_length(old: Any, new: Any) -> bool:
    are_sequences = isinstance(old, (tuple, list)) and type(old) is type(new)
    return are_sequences and len(old) == len(new)
