# SPDX-License-Identifier: Apache-2.0
"""Looks up the value and type at a key path of a config, and rejects unknown paths."""

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
    """Returns the value at a path, None if the config may set it but does not.

    Args:
        config: the config.
        keys: the key path, as names and indices. Negative indices are replaced in place by those
            from the start.

    Raises:
        UserError: for an unknown key, or an index out of range.
    """
    node = to_plain(config)
    for depth, key in enumerate(keys):
        if isinstance(node, (tuple, list)) and isinstance(key, int):
            if not -len(node) <= key < len(node):
                there = 'is 1 element' if len(node) == 1 else f'are {len(node)} elements'
                raise UserError(
                    f'config.{paths.join(keys[: depth + 1])}: there {there}; the first is [0]'
                )
            # The caller stores the new value at these keys, and reports them as the path.
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
    """Checks the keys of a dict, tuple or list that was set at a path.

    Args:
        config: the config, which contains the value already.
        given: the dict, tuple or list.
        keys: the key path, as names and indices.

    Raises:
        UserError: for an unknown key.
    """
    _check_names_at(to_plain(config), given, keys)


def _check_names_at(config: Mapping[str, Any], given: Any, keys: paths.Keys) -> None:
    if isinstance(given, (tuple, list)):
        for index, inner in enumerate(given):
            _check_names_at(config, inner, [*keys, index])
    if not isinstance(given, Mapping):
        return
    # The value may be merged into an object: its target is then in the config, not in `given`.
    node, section = paths.get(config, keys), schema.section_at(keys)
    is_object = isinstance(node, Mapping) and 'target' in node
    for key, inner in given.items():
        inner_keys = [*keys, key]
        is_known = key in targets.RESERVED or key == 'ref'
        if section is not None and not schema.takes_any_key(section):
            is_known = key in schema.fields(section)
        elif not is_known and (is_object or section is not None):
            is_known = not is_object or reach.may_be_set(node, inner_keys, len(keys))
        elif not is_object:
            is_known = True  # A dict without a target, as an argument may be: any key is valid.
        if not is_known:
            raise UserError(unknown.message(config, inner_keys, len(keys)))
        _check_names_at(config, inner, inner_keys)


def argument_type(node: Any, key: str | int, path: str) -> Any:
    """Returns the type of an argument according to the target's signature, None if unknown.

    Args:
        node: the object's dict; anything else has no arguments.
        key: name of the argument.
        path: key path of the object, for messages.
    """
    parameter = _parameter(node, key, path)
    if parameter is None:
        return None
    hint = annotation(node, key, path)
    kind = _plain_type(hint)
    # Only a bool default determines the type: a parameter `x=1` may well accept a float.
    if kind is None and isinstance(parameter.default, bool):
        kind = bool
    return kind | None if kind is not None and _may_be_none(parameter, hint) else kind


def takes_none(node: Any, key: str | int, path: str) -> bool:
    """Whether the default or the annotation of an object's argument allows None."""
    parameter = _parameter(node, key, path)
    return parameter is not None and _may_be_none(parameter, annotation(node, key, path))


def _may_be_none(parameter: inspect.Parameter, hint: Any) -> bool:
    if parameter.default is None:
        return True
    if parameter.annotation is inspect.Parameter.empty:
        return False
    # A `hint` of None is an annotation that cannot be evaluated: the target decides.
    return hint is None or hint is Any or types.NoneType in sequences.options(hint)


def _plain_type(hint: Any) -> Any:
    """Returns int for `int` and `int | None`, and tuple[int, ...] for any sequence of int.

    None for other annotations; then the default and the target determine how the text of an
    override is converted.
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
    """Returns the evaluated annotation of an object's argument, None if there is none.

    Args:
        node: the object's dict; anything else has no arguments.
        key: name of the argument.
        path: key path of the object, for messages.
    """
    parameter = _parameter(node, key, path)
    if parameter is None or parameter.annotation is inspect.Parameter.empty:
        return None
    # Text if the target's module has `from __future__ import annotations`.
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
    """Returns the type of a placeholder that has no value yet, None if the file declares none."""
    if not paths.contains(config, keys):
        return None
    parent = paths.get(config, keys[:-1])
    if not isinstance(parent, ml_collections.ConfigDict):
        return None
    # Reading an empty placeholder as an attribute would raise; its reference has the type.
    value = dict(parent.items(preserve_field_references=True))[keys[-1]]
    is_empty = isinstance(value, ml_collections.FieldReference) and value.empty()
    return value.get_type() if is_empty and value.get_type() is not type(None) else None
