# SPDX-License-Identifier: Apache-2.0
"""Key paths of a config, such as 'data.transforms[1].size': parsing, reading and storing."""

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
_LONGEST = 500


def parse(path: str) -> Keys:
    """Returns ['data', 'transforms', 1, 'size'] for 'data.transforms[1].size'.

    Raises:
        UserError: if the text is no path.
    """
    short = f'--config.{shorten(path)}'
    try:
        keys: Keys = [int(m[2]) if m[2] else m[1] for m in _KEY.finditer(path)]
    except ValueError as error:  # An index of thousands of digits.
        raise UserError(f'{short}: not a path such as a.b or a.b[1].c') from error
    if not keys or join(keys) != path or len(path) > _LONGEST:
        raise UserError(f'{short}: not a path such as a.b or a.b[1].c')
    if len(keys) > literals.MAX_DEPTH:
        raise UserError(f'{short}: {len(keys)} keys; no config is nested so deep')
    for key in keys:
        if isinstance(key, str):
            literals.check_name(key, short)
    return keys


def join(keys: Sequence[str | int]) -> str:
    """Returns the text of a path; undoes `parse`."""
    text = ''.join(f'[{key}]' if isinstance(key, int) else f'.{key}' for key in keys)
    return text.removeprefix('.')


def nest(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns a dict in which what was at the key 'a.b' is at 'b' of 'a'.

    Args:
        node: the dict.
        path: 'config.a.b', for messages.

    Raises:
        UserError: if something is at both, and for '12.5%', whose dot does not separate names.
    """
    whole: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(key, str) and '.' in key and (is_duration(key) or _is_number(key)):
            raise UserError(
                f'{path}: the key {short_repr(key)} has a dot, which no key of a config may have; '
                'write a whole number of steps'
            )
        inner = nest(value, f'{path}.{key}') if isinstance(value, Mapping) else value
        for name in reversed(key.split('.') if isinstance(key, str) else [key]):
            inner = {name: inner}
        whole = _merge(whole, inner, [])
    return whole


def _is_number(text: str) -> bool:
    return isinstance(literals.literal(text), (int, float))


def _merge(one: Mapping[Any, Any], other: Mapping[Any, Any], before: Keys) -> dict[Any, Any]:
    """Returns what stands in either of two dicts."""
    whole = dict(one)
    for key, value in other.items():
        keys = [*before, key]
        if key not in whole:
            whole[key] = value
        elif isinstance(whole[key], Mapping) and isinstance(value, Mapping):
            whole[key] = _merge(whole[key], value, keys)
        else:
            raise UserError(
                f'{short_repr(join(keys))} is given twice, {short_repr(whole[key])} and '
                f'{short_repr(value)}: by a key with dots and by nested keys. Remove one of them'
            )
    return whole


def get(config: Any, keys: Sequence[str | int]) -> Any:
    """Returns the value at a path that exists."""
    for key in keys:
        config = config[key]
    return config


def contains(config: Any, keys: Sequence[str | int]) -> bool:
    """Whether a path of names exists in a config."""
    for key in keys:
        if not isinstance(config, Mapping | ml_collections.ConfigDict) or key not in config:
            return False
        config = _value(config, key)
    return True


def store(config: ml_collections.ConfigDict, keys: Keys, value: Any) -> None:
    """Sets a value; tuples and plain dicts on the way are replaced by changed copies."""
    key, rest = keys[0], keys[1:]
    inner = _value(config, key)
    if isinstance(inner, ml_collections.ConfigDict) and rest:
        store(inner, rest, value)
    elif isinstance(inner, ml_collections.ConfigDict) and isinstance(value, Mapping):
        _update(inner, value)
    elif rest:
        config[key] = with_value({} if inner is None else inner, rest, value)
    else:
        config[key] = value


def _value(config: Any, key: str | int) -> Any:
    try:
        return config.get(key)
    except config_dict.RequiredValueError:
        return None


def _update(config: ml_collections.ConfigDict, value: Mapping[str, Any]) -> None:
    """Makes a config equal to `value`; what does not change keeps its references."""
    for key in [key for key in config if key not in value]:
        del config[key]
    before = to_plain(config)
    for key, new in value.items():
        if key not in before or diff.diff(before[key], new):
            store(config, [key], new)


def with_value(node: Any, keys: Keys, value: Any) -> Any:
    """Returns plain containers with another value at one place; those on the way are copies."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, (tuple, list)):
        items = list(node)
        items[int(key)] = with_value(items[int(key)], rest, value)
        return type(node)(items)
    return {**node, key: with_value(node.get(key, {}), rest, value)}
