# SPDX-License-Identifier: Apache-2.0
"""Goes through the nodes of `config.optimizer`: nested dicts with a target and its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config import objects, paths, targets

# A key path below a node.
KeyPath = tuple[str | int, ...]


def items(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yields the direct children of a node, with their keys."""
    if isinstance(node, Mapping):
        yield from node.items()
    # Not subclasses, such as a NamedTuple: these are values, not nodes of the config.
    elif type(node) in (tuple, list):
        yield from enumerate(node)


def walk(node: Any, keys: paths.Keys | None = None) -> Iterator[tuple[paths.Keys, Any]]:
    """Yields a node and all that is below it, with key paths; each before its children.

    Args:
        node: a node or a value.
        keys: its key path, in recursive calls.
    """
    keys = keys or []
    yield keys, node
    for key, value in items(node):
        yield from walk(value, [*keys, key])


def owner(keys: paths.Keys) -> paths.Keys:
    """Returns the key path of the target that an argument belongs to, by name or by position."""
    return keys[:-2] if keys[-2:-1] == ['args'] else keys[:-1]


def parameters(
    node: Mapping[str, Any], path: str
) -> tuple[Mapping[str, inspect.Parameter], dict[KeyPath, str]]:
    """Returns the parameters of a node's target, and the argument name of each key path."""
    known, _ = targets.arguments(objects.resolve(node['target'], f'{path}.target'))
    by_position = [p.name for p in known.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    names: dict[KeyPath, str] = {
        ('args', index): name
        for index, (name, _) in enumerate(zip(by_position, node.get('args', ()), strict=False))
    }
    names.update({(key,): key for key in node if key not in targets.RESERVED})
    return known, names
