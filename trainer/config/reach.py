# SPDX-License-Identifier: Apache-2.0
"""Checks whether a config contains or may set a key path, and repairs misspelled paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import objects, paths, schema, signatures, suggest, targets
from trainer.config.errors import UserError

# An override may create an evaluation or a group as a whole, or by setting this required key of it.
# With any other key, the new name is probably a misspelled one: `evals.tset.every`.
_FIRST_KEYS: dict[tuple[str | int, ...], str] = {
    ('evals',): 'data',
    ('optimizer', 'groups'): 'params',
}


def contains(node: Any, key: str | int) -> bool:
    """Whether a plain container has an element with that name or (non-negative) index."""
    if isinstance(node, (tuple, list)):
        return isinstance(key, int) and 0 <= key < len(node)
    return isinstance(node, Mapping) and key in node


def may_be_set(node: Any, keys: Sequence[str | int], depth: int) -> bool:
    """Whether a key that the file does not set is a fixed key, or an argument of a target.

    Args:
        node: the plain value at the first `depth` keys.
        keys: the key path, as names and indices.
        depth: index of the key in question.

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
    # What is inside an argument without a value is unknown, so only the argument itself may be set.
    if not is_object or depth != len(keys) - 1:
        return False
    where = f'config.{paths.join(keys[:depth])}'
    return key == 'args' or key in targets.accepted_keys(node['target'], {key: None}, where)


def possible_names(node: Any, keys: Sequence[str | int]) -> list[str]:
    """Returns the names that are valid in a container: its own, fixed keys, and arguments."""
    section = schema.section_at(keys)
    known = [key for key in node if isinstance(key, str)] if isinstance(node, Mapping) else []
    known += list(schema.fields(section)) if section is not None else []
    if isinstance(node, Mapping) and 'target' in node:
        target = objects.resolve(node['target'], f'config.{paths.join(keys)}.target')
        known += targets.visible_arguments(signatures.arguments(target)[0])
    return list(dict.fromkeys(known))


def _takes_any_name(keys: Sequence[str | int]) -> bool:
    """Whether the keys of a container are chosen by the user, as in `evals`, `hooks` and `mesh`."""
    return schema.section_at(keys) is None and schema.type_at([*keys, 'any']) is not None


def repair(config: Any, keys: Sequence[str | int]) -> tuple[paths.Keys, bool]:
    """Replaces each unknown name of a path by the most similar valid one.

    Args:
        config: the plain config.
        keys: the key path, as names and indices.

    Returns:
        The beginning of the path that could be repaired, and whether that is the whole path.
    """
    repaired: paths.Keys = []
    node, has_changed = config, False
    for depth, key in enumerate(keys):
        # The keys so far are repaired, because what may be set depends on them.
        path = [*repaired, *keys[depth:]]
        try:
            if not contains(node, key) and not may_be_set(node, path, depth):
                names = [name for name in possible_names(node, repaired) if name != key]
                nearest = suggest.nearest_name(str(key), names)
                if nearest is None:
                    return repaired, False
                key, has_changed = nearest, True
            # Any name would be valid here, so this one does not confirm the replacement above it.
            elif has_changed and not contains(node, key) and _takes_any_name(repaired):
                return repaired, False
        except UserError:  # The target of an object on the path does not exist.
            return repaired, False
        repaired.append(key)
        node = node[key] if contains(node, key) else None
    return repaired, True
