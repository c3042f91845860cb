# SPDX-License-Identifier: Apache-2.0
"""Checks which key paths of a config exist: those it contains, and those that may be set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import objects, paths, schema, signatures, suggest, targets
from trainer.config.errors import UserError

# A new evaluation, or group, begins with this key; any other key of an unknown one is a typo.
_FIRST_KEYS: dict[tuple[str | int, ...], str] = {
    ('evals',): 'data',
    ('optimizer', 'groups'): 'params',
}


def contains(node: Any, key: str | int) -> bool:
    """Whether a plain container has an element of that name or (non-negative) index."""
    if isinstance(node, (tuple, list)):
        return isinstance(key, int) and 0 <= key < len(node)
    return isinstance(node, Mapping) and key in node


def may_be_set(node: Any, keys: Sequence[str | int], depth: int) -> bool:
    """Whether a key that the file leaves out exists: a fixed key, or an argument of a target.

    Args:
        node: the plain value at the first `depth` keys.
        keys: a path.
        depth: which of its keys is left out.

    Raises:
        UserError: if the target does not exist.
    """
    key = keys[depth]
    if not isinstance(key, str):
        return False
    if schema.type_at(keys) is not None:
        first = _FIRST_KEYS.get(tuple(keys[:depth]))
        return first is None or list(keys[depth + 1 : depth + 2]) in ([], [first])
    is_object = isinstance(node, Mapping) and 'target' in node
    if not is_object or depth != len(keys) - 1:
        return False
    where = f'config.{paths.join(keys[:depth])}'
    return key == 'args' or key in targets.accepted_keys(node['target'], {key: None}, where)


def possible_names(node: Any, keys: Sequence[str | int]) -> list[str]:
    """Returns the names that a container at a path may have: held, fixed, or arguments."""
    section = schema.section_at(keys)
    known = [key for key in node if isinstance(key, str)] if isinstance(node, Mapping) else []
    known += list(schema.fields(section)) if section is not None else []
    if isinstance(node, Mapping) and 'target' in node:
        target = objects.resolve(node['target'], f'config.{paths.join(keys)}.target')
        known += targets.visible_arguments(signatures.arguments(target)[0])
    return list(dict.fromkeys(known))


def _takes_any_name(keys: Sequence[str | int]) -> bool:
    """Whether a path is a dict like `evals`, `hooks` and `mesh`, whose keys are free."""
    return schema.section_at(keys) is None and schema.type_at([*keys, 'any']) is not None


def repair(whole: Any, keys: Sequence[str | int]) -> tuple[paths.Keys, bool]:
    """Returns a path with each wrong name replaced by the one most like it.

    Returns:
        the path as far as that is possible, and whether that is all of it.
    """
    out: paths.Keys = []
    node, replaced = whole, False
    for depth, key in enumerate(keys):
        rest = [*out, *keys[depth:]]
        try:
            if not contains(node, key) and not may_be_set(node, rest, depth):
                near = suggest.nearest_name(
                    str(key), [n for n in possible_names(node, out) if n != key]
                )
                if near is None:
                    return out, False
                key, replaced = near, True
            elif replaced and not contains(node, key) and _takes_any_name(out):
                return out, False  # That a new name fits there says nothing about the repair.
        except UserError:  # The target of a node on the way does not exist.
            return out, False
        out.append(key)
        node = node[key] if contains(node, key) else None
    return out, True
