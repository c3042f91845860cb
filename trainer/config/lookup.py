# SPDX-License-Identifier: Apache-2.0
"""What stands at a path of a config, whether it may be set, and what a wrong one probably meant."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from trainer.config import objects, paths, schema, suggest, targets
from trainer.config.errors import UserError
from trainer.config.loading import plain

# A new evaluation, or group, begins with this key; any other key of an unknown one is a typo.
_FIRST_KEYS: dict[tuple[str | int, ...], str] = {
    ('evals',): 'data',
    ('optimizer', 'groups'): 'params',
}
# Annotations that say what a text of the command line means: `int`, `float | None`,
# `Sequence[int]`, `tuple[str, ...]`. All others leave it to the target.
_PLAIN_TYPES: dict[str, Any] = {
    'int': int,
    'float': float,
    'str': str,
    'bool': bool,
    'Sequence[int]': tuple[int, ...],
    'Sequence[float]': tuple[float, ...],
    'Sequence[str]': tuple[str, ...],
    'tuple[int, ...]': tuple[int, ...],
    'tuple[float, ...]': tuple[float, ...],
    'tuple[str, ...]': tuple[str, ...],
}


def value_at(config: Any, keys: paths.Keys) -> Any:
    """Returns the value at a path, None if it may be set but is not.

    Indices from the end become those from the start, in place.

    Raises:
        UserError: if nothing reads that path.
    """
    node = plain(config)
    for depth, key in enumerate(keys):
        if isinstance(node, (tuple, list)) and isinstance(key, int):
            if not -len(node) <= key < len(node):
                there = 'is 1 element' if len(node) == 1 else f'are {len(node)} elements'
                raise UserError(
                    f'config.{paths.join(keys[: depth + 1])}: there {there}; the first is [0]'
                )
            keys[depth] = key % len(node)
            node = node[key]
        elif isinstance(node, Mapping) and key in node:
            node = node[key]
        elif _may_be_set(node, keys, depth):
            return None
        else:
            raise UserError(_unknown(config, keys, depth))
    return node


def argument_type(node: Any, key: str | int, path: str) -> Any:
    """Returns the type that an object's signature gives an argument, None if it says none.

    Args:
        node: the object's dict; anything else has no arguments.
        key: the argument.
        path: of the object, for messages.
    """
    parameter = _parameter(node, key, path)
    if parameter is None:
        return None
    text = _annotation(parameter).removesuffix(' | None').rpartition('collections.abc.')[2]
    kind = _PLAIN_TYPES.get(text, bool if isinstance(parameter.default, bool) else None)
    return kind | None if kind is not None and _may_be_none(parameter) else kind


def takes_none(node: Any, key: str | int, path: str) -> bool:
    """Whether an argument of an object may be None: by its default, or by its annotation."""
    parameter = _parameter(node, key, path)
    return parameter is not None and _may_be_none(parameter)


def _may_be_none(parameter: inspect.Parameter) -> bool:
    said = re.search(r'\b(None|NoneType|Optional|Any)\b', _annotation(parameter))
    return parameter.default is None or said is not None


def _annotation(parameter: inspect.Parameter) -> str:
    given = parameter.annotation
    return given if isinstance(given, str) else inspect.formatannotation(given)


def _parameter(node: Any, key: str | int, path: str) -> inspect.Parameter | None:
    if not isinstance(node, Mapping | ml_collections.ConfigDict) or 'target' not in node:
        return None
    known, _ = targets.arguments(objects.resolve(node['target'], f'{path}.target'))
    return known.get(str(key))


def placeholder_type(config: Any, keys: paths.Keys) -> type | None:
    """Returns the type that the file declares for a value yet to come, None if it declares none."""
    if not paths.holds(config, keys):
        return None
    parent = paths.get(config, keys[:-1])
    if not isinstance(parent, ml_collections.ConfigDict):
        return None
    value = dict(parent.items(preserve_field_references=True))[keys[-1]]
    is_empty = isinstance(value, ml_collections.FieldReference) and value.empty()
    return value.get_type() if is_empty and value.get_type() is not type(None) else None


def _may_be_set(node: Any, keys: paths.Keys, depth: int) -> bool:
    """Whether a key that the file leaves out exists: a fixed key, or an argument of a target."""
    if schema.type_at(keys) is not None:
        first = _FIRST_KEYS.get(tuple(keys[:depth]))
        return first is None or keys[depth + 1 : depth + 2] in ([], [first])
    is_object = isinstance(node, Mapping) and 'target' in node
    if not is_object or depth != len(keys) - 1 or not isinstance(keys[depth], str):
        return False
    where = f'config.{paths.join(keys[:depth])}'
    key = str(keys[depth])
    return key == 'args' or key in targets.accepted(node['target'], {key: None}, where)


def _unknown(config: Any, keys: paths.Keys, depth: int) -> str:
    """The message for a path that nothing reads, with the one that was probably meant."""
    whole = plain(config)
    path, word = f'config.{paths.join(keys)}', str(keys[depth])
    unset = [*schema.defaults(whole), *schema.optional(whole)]
    known = [*suggest.paths(whole, 'config'), *(f'config.{p}' for p, _, _ in unset)]
    parent = paths.get(whole, keys[:depth])
    if isinstance(parent, Mapping) and 'target' in parent:
        return _unknown_argument(parent, keys, depth, known)
    if isinstance(parent, Mapping) and depth < len(keys) - 1:
        # One wrong word on the way: mend that word and keep the rest.
        siblings = [p.split('.')[depth] for p, _, _ in unset if p.count('.') >= depth]
        close = suggest.nearest(word, [*parent, *siblings])
        if close and _exists(config, keys, depth, close):
            return _did_you_mean(path, _replaced(keys, depth, close))
    return _did_you_mean(path, suggest.nearest_path(path, known))


def _unknown_argument(
    node: Mapping[str, Any], keys: paths.Keys, depth: int, known: Sequence[str]
) -> str:
    path, place = f'config.{paths.join(keys)}', f'config.{paths.join(keys[:depth])}'
    target = objects.resolve(node['target'], f'{place}.target')
    names = targets.told(targets.arguments(target)[0])
    close = suggest.nearest(str(keys[depth]), [*names, *node], cutoff=0.75)
    if close:
        return _did_you_mean(path, _replaced(keys, depth, close))
    found = suggest.nearest_path(path, [*known, *(f'{place}.{name}' for name in names)])
    if found is None or path.startswith(f'{found}.'):
        return f'{path}: {node["target"]} takes no such argument. It takes: {", ".join(names)}.'
    return _did_you_mean(path, found)


def _exists(config: Any, keys: paths.Keys, depth: int, word: str) -> bool:
    if word == keys[depth]:
        return False
    mended = [*keys[:depth], word, *keys[depth + 1 :]]
    try:
        value = value_at(config, mended)
    except UserError:
        return False
    # A mapping (`evals`, `hooks`, `mesh`) takes any name: that a new one fits proves nothing.
    fixed_or_argument = schema.type_at(mended) is None or schema.section_at(mended[:-1])
    return value is not None or bool(fixed_or_argument)


def _replaced(keys: paths.Keys, depth: int, word: str) -> str:
    return f'config.{paths.join([*keys[:depth], word, *keys[depth + 1 :]])}'


def _did_you_mean(path: str, found: str | None) -> str:
    hint = f'Did you mean {found}?' if found else 'See --helpconfig for all keys.'
    return f'{path}: there is no such key. {hint}'
