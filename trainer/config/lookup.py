# SPDX-License-Identifier: Apache-2.0
"""Looks up values and types at key paths of a config, and reports unknown paths."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from trainer.config import (
    objects,
    paths,
    reach,
    schema,
    sequences,
    signatures,
    targets,
    unknown,
)
from trainer.config.errors import UserError
from trainer.config.loading import to_plain


def value_at(config: Any, keys: paths.Keys) -> Any:
    """Returns the value at a path, None if it may be set but is not.

    Indices from the end become those from the start, in place.

    Raises:
        UserError: if nothing reads that path.
    """
    node = to_plain(config)
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
        elif reach.may_be_set(node, keys, depth):
            return None
        else:
            raise UserError(unknown.message(to_plain(config), keys, depth))
    return node


def check_names(config: Any, given: Any, keys: paths.Keys) -> None:
    """Checks the names in a dict or list that was given for a path, as the names of a path.

    Args:
        config: the config, with the value in it.
        given: the dict, tuple or list.
        keys: the path.

    Raises:
        UserError: for a name that nothing reads.
    """
    _check_names_at(to_plain(config), given, keys)


def _check_names_at(whole: Mapping[str, Any], given: Any, keys: paths.Keys) -> None:
    if isinstance(given, (tuple, list)):
        for index, inner in enumerate(given):
            _check_names_at(whole, inner, [*keys, index])
    if not isinstance(given, Mapping):
        return
    node, section = paths.get(whole, keys), schema.section_at(keys)
    is_object = isinstance(node, Mapping) and 'target' in node
    for key, inner in given.items():
        inside = [*keys, key]
        known = key in targets.RESERVED or key == 'ref'
        if section is not None and not schema.takes_any_key(section):
            known = key in schema.fields(section)
        elif not known and (is_object or section is not None):
            known = not is_object or reach.may_be_set(node, inside, len(keys))
        elif not is_object:
            known = True  # A dict of anything.
        if not known:
            raise UserError(unknown.message(whole, inside, len(keys)))
        _check_names_at(whole, inner, inside)


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
    hint = annotation(node, key, path)
    kind = _plain_type(hint)
    if kind is None and isinstance(parameter.default, bool):
        kind = bool
    return kind | None if kind is not None and _may_be_none(parameter, hint) else kind


def takes_none(node: Any, key: str | int, path: str) -> bool:
    """Whether an argument of an object may be None: by its default, or by its annotation."""
    parameter = _parameter(node, key, path)
    return parameter is not None and _may_be_none(parameter, annotation(node, key, path))


def _may_be_none(parameter: inspect.Parameter, hint: Any) -> bool:
    if parameter.default is None:
        return True
    if parameter.annotation is inspect.Parameter.empty:
        return False
    # None is an annotation that cannot be evaluated: the target decides.
    return hint is None or hint is Any or types.NoneType in sequences.options(hint)


def _plain_type(hint: Any) -> Any:
    """Returns int for `int` and `int | None`, tuple[int, ...] for any sequence of int, or None.

    For None the default and the target decide how a text of the command line is read.
    """
    options = [option for option in sequences.options(hint) if option is not types.NoneType]
    if len(options) != 1:
        return None
    [hint] = options
    if hint in sequences.PLAIN:
        return hint
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    is_sequence = origin is Sequence or (origin is tuple and args[1:] == (...,))
    if not is_sequence or not args or args[0] not in sequences.PLAIN:
        return None
    return types.GenericAlias(tuple, (args[0], ...))


def annotation(node: Any, key: str | int, path: str) -> Any:
    """Returns the annotation of an argument of an object, None if it has none that is a type.

    Args:
        node: the object's dict; anything else has no arguments.
        key: the argument.
        path: of the object, for messages.
    """
    parameter = _parameter(node, key, path)
    if parameter is None or parameter.annotation is inspect.Parameter.empty:
        return None
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    target = objects.resolve(node['target'], f'{path}.target')
    return targets.evaluate_annotation(parameter.annotation, target)


def _parameter(node: Any, key: str | int, path: str) -> inspect.Parameter | None:
    if not isinstance(node, Mapping | ml_collections.ConfigDict) or 'target' not in node:
        return None
    known, _ = signatures.arguments(objects.resolve(node['target'], f'{path}.target'))
    return known.get(str(key))


def placeholder_type(config: Any, keys: paths.Keys) -> type | None:
    """Returns the type that the file declares for a value yet to come, None if it declares none."""
    if not paths.contains(config, keys):
        return None
    parent = paths.get(config, keys[:-1])
    if not isinstance(parent, ml_collections.ConfigDict):
        return None
    value = dict(parent.items(preserve_field_references=True))[keys[-1]]
    is_empty = isinstance(value, ml_collections.FieldReference) and value.empty()
    return value.get_type() if is_empty and value.get_type() is not type(None) else None
