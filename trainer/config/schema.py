# SPDX-License-Identifier: Apache-2.0
"""Reads a plain config into the dataclasses of its sections, and returns types of key paths."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from trainer.config import sequences, suggest, synonyms
from trainer.config.durations import Duration
from trainer.config.errors import UserError, short_repr, shorten
from trainer.config.sections import (
    EmaSection,
    HookSection,
    InitFromSection,
    Node,
    OptimizerSection,
    PrecisionSection,
    ScoreSection,
    Sections,
)

# 'package.module:Name', the name of something that Python can import.
_NAME = re.compile(r'[A-Za-z_][\w.]*:[A-Za-z_][\w.]*')

Keys = Sequence[str | int]


class _Required:
    def __repr__(self) -> str:
        return '(required)'


# The value of a required placeholder that has not been set.
REQUIRED = _Required()


def read(config: Mapping[str, Any], *, complete: bool = True) -> Sections:
    """Returns the sections of a plain config, with defaults for the keys that it does not set.

    Args:
        config: the plain config.
        complete: whether a placeholder without a value is an error; otherwise it stays `REQUIRED`.

    Raises:
        UserError: for an unknown key, a missing required key, or a value of the wrong type.
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
    """Whether all but the fixed keys of a section go to a target, as in `config.optimizer`."""
    return any(f.metadata.get('rest') for f in dataclasses.fields(section))


def takes_ref(section: type) -> bool:
    """Whether a section may be an object alone, as in `config.hooks.name`."""
    return any(f.metadata.get('ref') for f in dataclasses.fields(section))


def type_at(keys: Keys) -> Any:
    """Returns the type of a path such as ('checkpoint', 'every'), None if it is not a fixed key.

    The type is `object` where any value is allowed (`ensemble.vary`).
    """
    hint: Any = Sections
    for key in keys:
        # `ema: EmaSection | None` has the keys of the section.
        hint = without_none(hint)
        if is_section(hint):
            hint = fields(hint).get(str(key))
        # A dict such as `evals` has any names as keys. The keys of an object, also a dict, are
        # arguments of its target.
        elif typing.get_origin(hint) is dict and hint != Node:
            hint = typing.get_args(hint)[1]
        elif hint is not object:  # Any path is allowed below `object`, and is `object` again.
            return None
        if hint is None:
            return None
    return hint


def section_at(keys: Keys) -> type | None:
    """Returns the class of the section at a path, None if there is no section."""
    hint = Sections if not keys else without_none(type_at(keys))
    return hint if is_section(hint) else None


def default_object(keys: Keys) -> dict[str, Any]:
    """Returns the default of a fixed key as a dict, such as {'data': -1} for ['mesh'], or {}."""
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
    """Yields (path, type, default) of the keys in sections that are None by default."""
    for path, _, default in defaults(config):
        section = section_at(path.split('.'))
        if section is not None and default is None:
            for field in dataclasses.fields(section):
                if not field.metadata.get('rest'):
                    yield f'{path}.{field.name}', fields(section)[field.name], default_of(field)


def defaults(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, type, default) of the fixed keys that a config does not set."""
    yield from _defaults(Sections, config, '')


def section_below(path: str, hint: Any) -> tuple[str, type] | None:
    """Returns (key path, class) of the section that a key holds, None if it holds none.

    Of a key with several sections by name, such as `evals`, the path is `evals.<name>`.

    Args:
        path: key path of the key.
        hint: the type of the key.
    """
    hint = without_none(hint)
    if typing.get_origin(hint) is dict and hint != Node:
        path, hint = f'{path}.<name>', typing.get_args(hint)[1]
    return (path, hint) if is_section(hint) else None


def _defaults(
    section: type, config: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(section):
        # `vars` has no keys but the user's own.
        if field.metadata.get('rest') or field.name == 'vars':
            continue
        path, hint = f'{prefix}{field.name}', fields(section)[field.name]
        inner = section_at(path.split('.'))
        if field.name not in config:
            default = default_of(field)
            if inner is None or default is None or default is REQUIRED:
                yield path, hint, default
            # A section that exists by default: `checkpoint.every` rather than `checkpoint`.
            else:
                yield from _defaults(inner, {}, f'{path}.')
        elif inner is not None and isinstance(config[field.name], Mapping):
            yield from _defaults(inner, config[field.name], f'{path}.')
        # A dict of sections, such as `evals`: each of them may leave keys out.
        elif typing.get_origin(hint) is dict and is_section(typing.get_args(hint)[1]):
            given = config[field.name]
            for name, value in given.items() if isinstance(given, Mapping) else ():
                if isinstance(value, Mapping):
                    yield from _defaults(typing.get_args(hint)[1], value, f'{path}.{name}.')


def _check_required(node: Any, path: str) -> None:
    if node is REQUIRED:
        raise UserError(f'{path} is required but has no value; set it: --{path}=VALUE')
    if isinstance(node, Mapping):
        for key, value in node.items():
            _check_required(value, f'{path}.{key}')
    elif isinstance(node, (tuple, list)):
        for index, value in enumerate(node):
            _check_required(value, f'{path}[{index}]')


def _read_section(section: type, node: Any, path: str, config: Mapping[str, Any]) -> Any:
    """Returns a section.

    Args:
        section: the dataclass of the section.
        node: its value in the config.
        path: its key path, for messages.
        config: the whole plain config, for suggestions.
    """
    if section in (HookSection, ScoreSection):
        _check_node(node, path)
    if not isinstance(node, Mapping):
        keys = ', '.join(fields(section))
        hint = _section_hint(section, node, path)
        raise UserError(
            f'{path}: expected a section (a dict) with keys of {keys}; got {short_repr(node)}{hint}'
        )
    known = fields(section)
    others = {key: value for key, value in node.items() if key not in known}
    if others and not takes_any_key(section):
        key = next(iter(others))
        more = [f'{path}.{name}' for name in known]
        hint = suggest.did_you_mean(f'{path}.{key}', config, more)
        raise UserError(f'Unknown key {path}.{key}. {hint}')
    missing = [
        f.name
        for f in dataclasses.fields(section)
        if f.name not in node
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f'{path}.{missing[0]} is missing; it has no default')
    values = {
        name: check(node[name], hint, f'{path}.{name}', config)
        for name, hint in known.items()
        if name in node
    }
    if takes_any_key(section):
        values['node'] = others
    return section(**values)


def check(value: Any, hint: Any, path: str, config: Mapping[str, Any]) -> Any:
    """Returns a value with the type of a key: text as a Duration, an int as a float.

    Args:
        value: the value in the config.
        hint: the type.
        path: its key path, for messages.
        config: the whole plain config, for suggestions.

    Raises:
        UserError: if the value does not have that type.
    """
    # An empty placeholder passes: `read` rejects it, unless the config may be incomplete.
    if hint is Any or value is REQUIRED:
        return value
    if sequences.is_union(hint):
        return _check_union(value, sequences.options(hint), path, config)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Duration:
        return Duration.parse(value, path)
    # Before `dict`, since an object is annotated as a dict too.
    if hint == Node:
        return _check_node(value, path)
    if is_section(hint):
        return _read_section(hint, value, path, config)
    if origin is Literal:
        if value not in args:
            suggestion = synonyms.VALUES.get(value) if isinstance(value, str) else None
            hint = f'. Did you mean {suggestion!r}?' if suggestion in args else ''
            raise UserError(
                f'{path}: {short_repr(value)} is none of {", ".join(map(repr, args))}{hint}'
            )
        return value
    if origin is dict and isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise UserError(f'{path}: expected names as keys, got {short_repr(wrong[0])}')
        return {k: check(v, args[1], f'{path}.{k}', config) for k, v in value.items()}
    if origin is tuple and isinstance(value, (tuple, list)):
        return _check_tuple(value, args, path, config)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return to_float(value, path)
    if hint is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f'{path}: {short_repr(value)} does not fit 64 bits')
    # In Python a bool is an int, but `batch_size=True` is a mistake.
    is_bool = isinstance(value, bool)
    fits = hint is object or (hint is bool) == is_bool
    if isinstance(hint, type) and isinstance(value, hint) and fits:
        return value
    raise UserError(f'{path}: expected {describe(hint)}, got {short_repr(value)}')


def to_float(value: float, path: str) -> float:
    """Returns a number as a float.

    Raises:
        UserError: for an integer that is larger than any float.
    """
    try:
        return float(value)
    except OverflowError as error:
        raise UserError(f'{path}: {short_repr(value)} is too large for a float') from error


def describe(hint: Any) -> str:
    """Returns the name of a type in messages: 'int', 'duration', 'object', 'carry|pad|drop'."""
    if sequences.is_union(hint):
        options = sequences.options(hint)
        return ' or '.join('None' if a is types.NoneType else describe(a) for a in options)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Duration:
        return 'duration'
    if is_section(hint):
        return 'section'
    if hint == Node:
        return 'object'
    if origin is Literal:
        return '|'.join(args)
    if origin in (tuple, dict):
        inner = ', '.join('...' if a is Ellipsis else describe(a) for a in args)
        return f'{origin.__name__}[{inner}]'
    return getattr(hint, '__name__', str(hint))


def _check_union(value: Any, allowed: Sequence[Any], path: str, config: Mapping[str, Any]) -> Any:
    """Returns a value with the first of the allowed types that it has."""
    if value is None and types.NoneType in allowed:
        return None
    options = [a for a in allowed if a is not types.NoneType]
    for option in options:
        try:
            return check(value, option, path, config)
        except UserError:
            # The error about an element is more specific than "expected str or tuple[str, ...]".
            is_container = isinstance(value, (Mapping, tuple, list)) and option is options[-1]
            if is_container or len(options) == 1:
                raise
    expected = ' or '.join(describe(option) for option in options)
    raise UserError(f'{path}: expected {expected}, got {short_repr(value)}')


def _section_hint(section: type, value: Any, path: str) -> str:
    """Returns a hint for a value in place of a section, such as `precision='bf16'`, or ''."""
    key, suggestion = None, value
    if section is PrecisionSection and isinstance(value, str) and value in synonyms.VALUES:
        key, suggestion = 'compute', synonyms.VALUES[value]
    elif section is OptimizerSection and isinstance(value, str) and _NAME.fullmatch(value):
        key = 'target'
    elif section is InitFromSection and isinstance(value, str) and value:
        key = 'path'
    elif section is EmaSection and isinstance(value, float):
        key = 'decay'
    return f'. Did you mean {path}.{key}={shorten(str(suggestion), 100)}?' if key else ''


def _check_node(value: Any, path: str) -> Node:
    if not isinstance(value, Mapping) or not ('target' in value or 'ref' in value):
        raise UserError(
            f"{path}: expected an object, a dict with 'target' (or 'ref') = 'package.module:Name', "
            f'got {short_repr(value)}{_target_hint(value, path)}'
        )
    return dict(value)


def _target_hint(value: Any, path: str) -> str:
    """Returns how to write the object that a text names, '' if it names none."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        return ''
    return (
        f""". Write --{path}='{{"target": "{value}"}}' to call it, or "ref" in place of """
        '"target" to pass it as it is, such as a function'
    )


def _check_tuple(
    value: Sequence[Any], args: tuple[Any, ...], path: str, config: Mapping[str, Any]
) -> tuple[Any, ...]:
    hints = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(hints) != len(value):
        raise UserError(
            f'{path}: expected {len(hints)} elements, got {len(value)}: {short_repr(value)}'
        )
    pairs = enumerate(zip(value, hints, strict=True))
    return tuple(check(v, h, f'{path}[{i}]', config) for i, (v, h) in pairs)


def is_section(hint: Any) -> bool:
    """Whether a type is that of a section, a dict with fixed keys."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint is not Duration


def without_none(hint: Any) -> Any:
    """Returns `float` for `float | None`, and any other type unchanged."""
    if not sequences.is_union(hint):
        return hint
    options = [option for option in sequences.options(hint) if option is not types.NoneType]
    return options[0] if len(options) == 1 else hint
