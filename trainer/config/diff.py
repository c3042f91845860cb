# SPDX-License-Identifier: Apache-2.0
"""Differences between configs, and configs as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.config.errors import short_repr

ABSENT = '(absent)'


@dataclasses.dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        path: 'optimizer.learning_rate'.
        old: the value before, or ABSENT.
        new: the value after, or ABSENT.
    """

    path: str
    old: Any
    new: Any


def diff(old: Any, new: Any) -> list[Change]:
    """Returns the differences between two plain configs, by path."""
    return list(_changes(old, new, ''))


def format_diff(changes: Sequence[Change]) -> str:
    """Returns one aligned line for each change."""
    width = max(len(c.path) for c in changes)
    return '\n'.join(f'  {c.path:<{width}}  {c.old!r} -> {c.new!r}' for c in changes)


def to_jsonable(node: Any) -> Any:
    """Returns JSON values; a tuple becomes {'__tuple__': [...]}, and every key a string."""
    if isinstance(node, Mapping):
        return {str(key): to_jsonable(value) for key, value in node.items()}
    if isinstance(node, tuple):
        return {'__tuple__': [to_jsonable(value) for value in node]}
    if isinstance(node, list):
        return [to_jsonable(value) for value in node]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f'a config holds dicts, sequences, numbers and strings, not {node!r}')


def from_jsonable(node: Any) -> Any:
    """Undoes `to_jsonable`.

    Raises:
        ValueError: if a tuple is none.
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
        # JSON has made every key a string, so {1000: 0.1} is what was saved as {'1000': 0.1}.
        old, new = ({str(k): v for k, v in node.items()} for node in (old, new))
        for key in dict.fromkeys([*old, *new]):
            where = f'{path}.{key}' if path else key
            yield from _changes(old.get(key, ABSENT), new.get(key, ABSENT), where)
    elif _have_same_length(old, new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _changes(a, b, f'{path}[{index}]')
    elif type(old) is not type(new) or (old != new and not _are_both_nan(old, new)):
        yield Change(path, old, new)


def _are_both_nan(old: Any, new: Any) -> bool:
    return old != old and new != new


def _have_same_length(old: Any, new: Any) -> bool:
    sequences = isinstance(old, (tuple, list)) and type(old) is type(new)
    return sequences and len(old) == len(new)
