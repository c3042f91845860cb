# SPDX-License-Identifier: Apache-2.0
"""Objects in a config that was made in Python: classes, functions, and instances.

Each is replaced by its name, as a config file has it. An object that no module has under its name,
such as a class of a notebook, goes with the name, so that the run can use it in this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ml_collections
from ml_collections import config_dict

from trainer.config import advice, objects, schema
from trainer.config.errors import UserError
from trainer.config.objects import Named

_PLAIN = (type(None), bool, int, float, str)
_ADDRESS = re.compile(r' at 0x[0-9a-f]+')
_MAX_ARGUMENTS = 200


def name_objects(node: Any, keys: Sequence[str | int] = ()) -> Any:
    """Returns a config with names in place of objects: `dict(ref=...)` for one without arguments.

    Values that a config never holds (arrays, paths, sets), and objects where the config expects
    a section or a plain value, stay: `literals.check` says what to write instead.

    Args:
        node: a ConfigDict, whose references stay, or plain containers.
        keys: path of the node.
    """
    if isinstance(node, ml_collections.FieldReference):
        try:
            value = node.get()
        except config_dict.RequiredValueError:
            return node
        return name_objects(value, keys) if _is_object(value) else node
    if isinstance(node, ml_collections.ConfigDict):
        named = ml_collections.ConfigDict(allow_dotted_keys=True)
        for key, value in node.items(preserve_field_references=True):
            named[key] = name_objects(value, [*keys, key])
        return named
    if isinstance(node, dict):
        return {key: name_objects(value, [*keys, key]) for key, value in node.items()}
    if type(node) in (tuple, list):
        return type(node)(name_objects(value, [*keys, i]) for i, value in enumerate(node))
    if not _is_object(node):
        return node
    if keys and keys[-1] in ('target', 'ref'):
        _check_callable(node, keys)
        return _name(node)
    return {'ref': _name(node)} if _takes_object(keys) else node


def without_objects(node: Any) -> Any:
    """Returns a read-only plain config with the names alone."""
    if isinstance(node, Mapping):
        return MappingProxyType({key: without_objects(value) for key, value in node.items()})
    if type(node) in (tuple, list):
        return type(node)(map(without_objects, node))
    return str(node) if isinstance(node, Named) else node


def copy_as_dicts(node: Any) -> Any:
    """Returns a copy of a plain config in dicts, which JSON can write."""
    if isinstance(node, Mapping):
        return {key: copy_as_dicts(value) for key, value in node.items()}
    return type(node)(map(copy_as_dicts, node)) if type(node) in (tuple, list) else node


def find_objects(node: Any, path: str = '') -> Iterator[str]:
    """Yields the paths of names that only this process can resolve."""
    if isinstance(node, Named):
        yield path.removesuffix('.target').removesuffix('.ref')
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from find_objects(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, (tuple, list)):
        for index, value in enumerate(node):
            yield from find_objects(value, f'{path}[{index}]')


def _is_object(value: Any) -> bool:
    """Whether a value is an object that a config may name."""
    containers = (ml_collections.ConfigDict, ml_collections.FieldReference, dict)
    if isinstance(value, (*_PLAIN, *containers)) or type(value) in (tuple, list):
        return False
    return value is not schema.REQUIRED and not advice.is_value(value)


def _takes_object(keys: Sequence[str | int]) -> bool:
    """Whether a path may have an object: as an argument, or where the config has a target."""
    section = schema.section_at(keys)
    if section is not None and schema.takes_ref(section):
        return True
    hint = schema.type_at(keys)
    return hint in (None, object) or 'object' in schema.describe(hint).split(' or ')


def _check_callable(value: Any, keys: Sequence[str | int]) -> None:
    """Raises a UserError for a finished object as a target, which would be called."""
    is_factory = hasattr(value, '__qualname__') or isinstance(value, functools.partial)
    if keys[-1] == 'target' and not is_factory:
        path = f'config.{".".join(map(str, keys))}'
        raise UserError(
            f'{path}: expected a class or function to call, got a {type(value).__name__} object; '
            f'write {path.removesuffix(".target")} = dict(ref=...) with the object'
        )


def _name(value: Any) -> str:
    has_name = hasattr(value, '__qualname__')
    name = advice.public_name(value if has_name else type(value))
    if has_name and not name.startswith('__main__:'):
        with contextlib.suppress(UserError):
            if objects.resolve(name, '') is value:
                return name
    return Named(name if has_name else f'{name}({_arguments(value)})', value)


def _arguments(value: Any) -> str:
    """Returns 'width=8' for an instance of a dataclass, such as a Linen module; else '...'.

    The name identifies the run, so what differs between two instances must be in it.
    """
    if not dataclasses.is_dataclass(value):
        return '...'
    given = []
    for field in dataclasses.fields(value):
        x = getattr(value, field.name, None)
        is_default = x is field.default or (isinstance(x, _PLAIN) and x == field.default)
        if field.init and field.repr and not is_default:
            # Addresses of functions differ between two starts.
            given.append(f'{field.name}={_ADDRESS.sub("", " ".join(repr(x).split()))}')
    text = ', '.join(given)
    if len(text) <= _MAX_ARGUMENTS:
        return text
    return f'{text[:_MAX_ARGUMENTS]}... {hashlib.sha256(text.encode()).hexdigest()[:8]}'
