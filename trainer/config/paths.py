# SPDX-License-Identifier: Apache-2.0
"""Key paths such as 'data.transforms[1].size': parses them, and reads and sets their values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from trainer.config import diff, literals
from trainer.config.durations import is_duration
from trainer.config.errors import UserError, short_repr, shorten
from trainer.config.loading import to_plain

_KEY = re.compile(r'([^.\[\]]+)|\[(-?\d+)\]')
Keys = list[str | int]
_MAX_CHARACTERS = 500


def parse(path: str) -> Keys:
    """Returns ['data', 'transforms', 1, 'size'] for 'data.transforms[1].size'.

    Raises:
        UserError: if the text is not a path.
    """
    short = f'--config.{shorten(path)}'
    try:
        keys: Keys = [int(m[2]) if m[2] else m[1] for m in _KEY.finditer(path)]
    except ValueError as error:  # Python refuses to parse an index of thousands of digits.
        raise UserError(f'{short}: not a path such as a.b or a.b[1].c') from error
    # `finditer` skips what does not match, such as a second dot; the text of the keys shows it.
    if not keys or join(keys) != path or len(path) > _MAX_CHARACTERS:
        raise UserError(f'{short}: not a path such as a.b or a.b[1].c')
    if len(keys) > literals.MAX_DEPTH:
        raise UserError(
            f'{short}: expected at most {literals.MAX_DEPTH} levels of nesting, got {len(keys)}'
        )
    for key in keys:
        if isinstance(key, str):
            literals.check_name(key, short)
    return keys


def join(keys: Sequence[str | int]) -> str:
    """Returns the text of a path, the inverse of `parse`."""
    text = ''.join(f'[{key}]' if isinstance(key, int) else f'.{key}' for key in keys)
    return text.removeprefix('.')


def nest(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns {'a': {'b': value}} for {'a.b': value}, at every depth.

    Args:
        node: a dict whose keys may be paths.
        path: 'config.a.b', for messages.

    Raises:
        UserError: if a dotted key and nested ones set the same path, and for a key like '12.5%',
            whose dot does not separate names.
    """
    merged: dict[str, Any] = {}
    for key, value in node.items():
        # A schedule may have durations as keys, and '12.5%' must not become {'12': {'5%': ...}}.
        if isinstance(key, str) and '.' in key and (is_duration(key) or _is_number(key)):
            raise UserError(
                f'{path}: the key {short_repr(key)} has a dot, which config keys must not have; '
                'write a whole number of steps'
            )
        inner = nest(value, f'{path}.{key}') if isinstance(value, Mapping) else value
        for name in reversed(key.split('.') if isinstance(key, str) else [key]):
            inner = {name: inner}
        # Merged rather than updated: 'a.b' and 'a.c' share the key 'a'.
        merged = _merge(merged, inner, [])
    return merged


def _is_number(text: str) -> bool:
    return isinstance(literals.literal(text), (int, float))


def _merge(one: Mapping[Any, Any], other: Mapping[Any, Any], parents: Keys) -> dict[Any, Any]:
    """Returns the union of two nested dicts, which must not set the same path."""
    merged = dict(one)
    for key, value in other.items():
        keys = [*parents, key]
        if key not in merged:
            merged[key] = value
        elif isinstance(merged[key], Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(merged[key], value, keys)
        else:
            raise UserError(
                f'{short_repr(join(keys))} is given twice, {short_repr(merged[key])} and '
                f'{short_repr(value)}: by a dotted key and by nested keys. Remove one of them'
            )
    return merged


def get(config: Any, keys: Sequence[str | int]) -> Any:
    """Returns the value at a path that exists."""
    for key in keys:
        config = config[key]
    return config


def contains(config: Any, keys: Sequence[str | int]) -> bool:
    """Whether a path exists in a config; paths into tuples and lists count as missing."""
    for key in keys:
        if not isinstance(config, Mapping | ml_collections.ConfigDict) or key not in config:
            return False
        config = _value(config, key)
    return True


def store(config: ml_collections.ConfigDict, keys: Keys, value: Any) -> None:
    """Sets a value in place; tuples and plain dicts that contain it are replaced by copies."""
    key, rest = keys[0], keys[1:]
    inner = _value(config, key)
    if isinstance(inner, ml_collections.ConfigDict) and rest:
        store(inner, rest, value)
    elif isinstance(inner, ml_collections.ConfigDict) and isinstance(value, Mapping):
        _update(inner, value)
    elif rest:
        # A tuple cannot be changed, and a list or dict may be used at another path as well.
        config[key] = with_value({} if inner is None else inner, rest, value)
    else:
        config[key] = value


def _value(config: Any, key: str | int) -> Any:
    try:
        return config.get(key)
    except config_dict.RequiredValueError:  # A placeholder without a value.
        return None


def _update(config: ml_collections.ConfigDict, value: Mapping[str, Any]) -> None:
    """Makes a config equal to `value`, in place.

    Keys whose value does not change are left alone: setting one would also set the reference that
    it may share with other keys.
    """
    for key in [key for key in config if key not in value]:
        del config[key]
    before = to_plain(config)
    for key, new in value.items():
        if key not in before or diff.diff(before[key], new):
            store(config, [key], new)


def with_value(node: Any, keys: Keys, value: Any) -> Any:
    """Returns plain containers with the value at a path replaced; the argument is not changed."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, (tuple, list)):
        items = list(node)
        items[int(key)] = with_value(items[int(key)], rest, value)
        return type(node)(items)
    return {**node, key: with_value(node.get(key, {}), rest, value)}
