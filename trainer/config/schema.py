# SPDX-License-Identifier: Apache-2.0
"""Reads a plain config into its sections, and returns the types of its key paths."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from trainer.config import suggest, synonyms
from trainer.config.durations import Duration
from trainer.config.errors import UserError, short_repr, shorten
from trainer.config.sections import (
    EmaSection,
    InitFromSection,
    Node,
    OptimizerSection,
    PrecisionSection,
    Sections,
)

# How config files name what Python can import.
_NAME = re.compile(r'[A-Za-z_][\w.]*:[A-Za-z_][\w.]*')

Keys = Sequence[str | int]


class _Required:
    def __repr__(self) -> str:
        return '(required)'


# The value of a required placeholder that has not been set.
REQUIRED = _Required()


def read(config: Mapping[str, Any], *, complete: bool = True) -> Sections:
    """Returns the sections of a plain config, defaults filled in.

    Args:
        config: the plain config.
        complete: whether placeholders that have no value yet are errors; else they stay `REQUIRED`.

    Raises:
        UserError: for an unknown key, a missing required key, or a wrong type.
    """
    if complete:
        _check_required(config, 'config')
    return _read_section(Sections, config, 'config', config)


@functools.cache
def fields(section: type) -> dict[str, Any]:
    """Returns the type of each key of a section."""
    hints = typing.get_type_hints(section)
    return {
        f.name: hints[f.name] for f in dataclasses.fields(section) if not f.metadata.get('rest')
    }


def takes_any_key(section: type) -> bool:
    """Whether other keys than its own go to a target (`config.optimizer`)."""
    return any(f.metadata.get('rest') for f in dataclasses.fields(section))


def type_at(keys: Keys) -> Any:
    """Returns the type of a path like ('checkpoint', 'every'), None if it is not a fixed key.

    It is `object` where any key and any value may stand.
    """
    hint: Any = Sections
    for key in keys:
        hint = without_none(hint)
        if _is_section(hint):
            hint = fields(hint).get(str(key))
        elif typing.get_origin(hint) is dict and hint != Node:
            hint = typing.get_args(hint)[1]
        elif hint is not object:  # Below which any key may stand.
            return None
        if hint is None:
            return None
    return hint


def section_at(keys: Keys) -> type | None:
    """Returns the section's class of a path, or None if it is not a section."""
    hint = Sections if not keys else without_none(type_at(keys))
    return hint if _is_section(hint) else None


def default_object(keys: Keys) -> dict[str, Any]:
    """Returns the dict that a path left out stands for ({'data': -1} for ['mesh']), or {}."""
    parent = section_at(keys[:-1])
    for field in dataclasses.fields(parent) if parent is not None else ():
        if field.name == keys[-1] and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            return default if isinstance(default, dict) else {}
    return {}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Returns the default of a key, `REQUIRED` if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def optional_fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, type, default) of what is inside the optional sections that are left out."""
    for path, _, default in defaults(config):
        section = section_at(path.split('.'))
        if section is not None and default is None:
            for field in dataclasses.fields(section):
                yield f'{path}.{field.name}', fields(section)[field.name], default_of(field)


def defaults(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, type, default) of the fixed keys that a config leaves out."""
    yield from _defaults(Sections, config, '')


def _defaults(
    section: type, config: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(section):
        if field.metadata.get('rest') or field.name == 'vars':
            continue
        path, hint = f'{prefix}{field.name}', fields(section)[field.name]
        inner = section_at(path.split('.'))
        if field.name not in config:
            default = default_of(field)
            if inner is None or default is None or default is REQUIRED:
                yield path, hint, default
            else:
                yield from _defaults(inner, {}, f'{path}.')
        elif inner is not None and isinstance(config[field.name], Mapping):
            yield from _defaults(inner, config[field.name], f'{path}.')
        elif typing.get_origin(hint) is dict and _is_section(typing.get_args(hint)[1]):
            given = config[field.name]
            for name, value in given.items() if isinstance(given, Mapping) else ():
                if isinstance(value, Mapping):
                    yield from _defaults(typing.get_args(hint)[1], value, f'{path}.{name}.')


def _check_required(node: Any, path: str) -> None:
    if node is REQUIRED:
        raise UserError(f'{path} is required and has no value; give it one: --{path}=VALUE')
    if isinstance(node, Mapping):
        for key, value in node.items():
            _check_required(value, f'{path}.{key}')
    elif isinstance(node, (tuple, list)):
        for index, value in enumerate(node):
            _check_required(value, f'{path}[{index}]')


def _read_section(section: type, config: Any, path: str, whole: Mapping[str, Any]) -> Any:
    if not isinstance(config, Mapping):
        keys = ', '.join(fields(section))
        hint = _section_hint(section, config, path)
        raise UserError(
            f'{path}: expected a section (a dict) with keys of {keys}; got '
            f'{short_repr(config)}{hint}'
        )
    known = fields(section)
    unknown = {key: value for key, value in config.items() if key not in known}
    if unknown and not takes_any_key(section):
        key = next(iter(unknown))
        more = [f'{path}.{name}' for name in known]
        hint = suggest.did_you_mean(f'{path}.{key}', whole, more)
        raise UserError(f'Unknown key {path}.{key}. {hint}')
    missing = [
        f.name
        for f in dataclasses.fields(section)
        if f.name not in config
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f'{path}.{missing[0]} is missing; it has no default')
    values = {
        name: check(config[name], hint, f'{path}.{name}', whole)
        for name, hint in known.items()
        if name in config
    }
    if takes_any_key(section):
        values['node'] = unknown
    return section(**values)


def check(value: Any, hint: Any, path: str, whole: Mapping[str, Any]) -> Any:
    """Returns the value as the hint wants it (a Duration parsed, an int as float).

    Raises:
        UserError: if its type is another.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or value is REQUIRED:
        return value
    if origin in (types.UnionType, typing.Union):
        return _check_union(value, args, path, whole)
    if hint is Duration:
        return Duration.parse(value, path)
    if hint == Node:
        return _check_node(value, path)
    if _is_section(hint):
        return _read_section(hint, value, path, whole)
    if origin is Literal:
        if value not in args:
            meant = synonyms.VALUES.get(value) if isinstance(value, str) else None
            hint = f'. Did you mean {meant!r}?' if meant in args else ''
            raise UserError(
                f'{path}: {short_repr(value)} is none of {", ".join(map(repr, args))}{hint}'
            )
        return value
    if origin is dict and isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise UserError(f'{path}: expected names as keys, got {short_repr(wrong[0])}')
        return {k: check(v, args[1], f'{path}.{k}', whole) for k, v in value.items()}
    if origin is tuple and isinstance(value, (tuple, list)):
        return _check_tuple(value, args, path, whole)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return to_float(value, path)
    is_bool = isinstance(value, bool)
    if hint is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f'{path}: {short_repr(value)} does not fit 64 bits')
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool) == is_bool:
        return value
    raise UserError(f'{path}: expected {describe(hint)}, got {short_repr(value)}')


def to_float(value: float, path: str) -> float:
    """Returns a number as a float.

    Raises:
        UserError: for an integer that is too large.
    """
    try:
        return float(value)
    except OverflowError as error:
        raise UserError(f'{path}: {short_repr(value)} is too large for a float') from error


def describe(hint: Any) -> str:
    """Returns a type as the user reads it: 'int', 'duration', 'object', 'carry|pad|drop'."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return ' or '.join('None' if a is types.NoneType else describe(a) for a in args)
    if hint is Duration:
        return 'duration'
    if _is_section(hint):
        return 'section'
    if hint == Node:
        return 'object'
    if origin is Literal:
        return '|'.join(args)
    if origin in (tuple, dict):
        inner = ', '.join('...' if a is Ellipsis else describe(a) for a in args)
        return f'{origin.__name__}[{inner}]'
    return getattr(hint, '__name__', str(hint))


def _check_union(value: Any, args: Sequence[Any], path: str, whole: Mapping[str, Any]) -> Any:
    if value is None and types.NoneType in args:
        return None
    options = [a for a in args if a is not types.NoneType]
    for option in options:
        try:
            return check(value, option, path, whole)
        except UserError:
            inside = isinstance(value, (Mapping, tuple, list)) and option is options[-1]
            # What is wrong within a container says more than that none of the types fits.
            if inside or len(options) == 1:
                raise
    expected = ' or '.join(describe(option) for option in options)
    raise UserError(f'{path}: expected {expected}, got {short_repr(value)}')


def _section_hint(section: type, value: Any, path: str) -> str:
    """Returns which key of a section was probably meant by a value in the section's place."""
    key, meant = None, value
    if section is PrecisionSection and isinstance(value, str) and value in synonyms.VALUES:
        key, meant = 'compute', synonyms.VALUES[value]
    elif section is OptimizerSection and isinstance(value, str) and _NAME.fullmatch(value):
        key = 'target'
    elif section is InitFromSection and isinstance(value, str) and value:
        key = 'path'
    elif section is EmaSection and isinstance(value, float):
        key = 'decay'
    return f'. Did you mean {path}.{key}={shorten(str(meant), 100)}?' if key else ''


def _check_node(value: Any, path: str) -> Node:
    if not isinstance(value, Mapping) or not ('target' in value or 'ref' in value):
        raise UserError(
            f"{path}: expected an object, a dict with 'target' (or 'ref') = 'package.module:Name', "
            f'got {short_repr(value)}{_target_hint(value, path)}'
        )
    return dict(value)


def _target_hint(value: Any, path: str) -> str:
    """Returns how to write an object, for a text that names one."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        return ''
    return (
        f""". Write --{path}='{{"target": "{value}"}}' if it is called to make the object, or """
        '"ref" if it is the object, such as a function'
    )


def _check_tuple(
    value: Sequence[Any], args: tuple[Any, ...], path: str, whole: Mapping[str, Any]
) -> tuple[Any, ...]:
    hints = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(hints) != len(value):
        raise UserError(
            f'{path}: expected {len(hints)} elements, got {len(value)}: {short_repr(value)}'
        )
    pairs = enumerate(zip(value, hints, strict=True))
    return tuple(check(v, h, f'{path}[{i}]', whole) for i, (v, h) in pairs)


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint is not Duration


def without_none(hint: Any) -> Any:
    """Returns the type without the None that it allows: float for `float | None`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = [a for a in typing.get_args(hint) if a is not types.NoneType]
        return options[0] if len(options) == 1 else hint
    return hint
