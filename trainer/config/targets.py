# SPDX-License-Identifier: Apache-2.0
"""Creates objects from `dict(target='package.module:Name', ...)` and `dict(ref=...)`."""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from trainer.config import objects, suggest, words
from trainer.config.errors import UserError, short_repr, shorten
from trainer.config.signatures import arguments

# Arguments that the framework or the module system gives, so a config need not.
FRAMEWORK_SUPPLIED = frozenset({'rngs', 'train', 'training', 'is_training', 'deterministic'})

# Keys of an object's dict that are not arguments.
RESERVED = frozenset({'target', 'args', 'accepts_any'})

# How a target says that an argument is wrong; anything else is a failure of the program.
_REFUSALS = (TypeError, ValueError, LookupError, AssertionError, ImportError, FileNotFoundError)


def evaluate_annotation(annotation: str, target: Any) -> Any:
    """Returns the type that the text of an annotation names where its target was defined.

    None if that cannot be found out.
    """
    while isinstance(target, functools.partial):
        target = target.func
    target = inspect.unwrap(target) if callable(target) else target
    # The fields of a dataclass may come from a base in another module.
    owners = target.__mro__ if inspect.isclass(target) else (target,)
    for owner in owners:
        # Generic names are often imported for type checkers alone.
        scope = {
            **vars(typing),
            **vars(collections.abc),
            **vars(sys.modules.get(getattr(owner, '__module__', ''), typing)),
        }
        holder = types.SimpleNamespace(__annotations__={'it': annotation})
        with contextlib.suppress(Exception):  # Whatever the evaluation of a text raises.
            return typing.get_type_hints(holder, globalns=scope)['it']
    return None


def visible_arguments(parameters: Mapping[str, Any]) -> list[str]:
    """Returns the arguments that a message names: not what the framework or Linen supplies."""
    linens = {'parent', 'name'} if 'parent' in parameters else set()
    return [name for name in parameters if name not in FRAMEWORK_SUPPLIED | linens]


def check(node: Any, path: str) -> None:
    """Imports every target below a node and checks its arguments, without calling anything.

    Raises:
        UserError: for a name that does not exist or an argument that does not fit.
    """
    if isinstance(node, Mapping):
        if 'target' in node:
            _check_arguments(objects.resolve(node['target'], f'{path}.target'), node, path)
        elif 'ref' in node:
            _resolve_reference(node, path)
        for key, value in node.items():
            check(value, f'{path}.{key}')
    elif isinstance(node, (tuple, list)):
        for index, value in enumerate(node):
            check(value, f'{path}[{index}]')


def takes_argument(node: Any, name: str, path: str) -> bool:
    """Whether any target below a node has an argument of that name which the node leaves out."""
    if isinstance(node, (tuple, list)):
        return any(takes_argument(value, name, f'{path}[{i}]') for i, value in enumerate(node))
    if not isinstance(node, Mapping):
        return False
    target = node.get('target')
    mine = target is not None and name in arguments(objects.resolve(target, f'{path}.target'))[0]
    return (mine and name not in node) or any(
        takes_argument(v, name, f'{path}.{k}') for k, v in node.items()
    )


def instantiate(node: Any, path: str, supplied: Mapping[str, Any] | None = None) -> Any:
    """Returns the object that a node describes; containers are walked, other values are themselves.

    Args:
        node: a dict with 'target' or 'ref', a container of such, or any other value.
        path: where it stands, for messages.
        supplied: given to every target that takes an argument of that name and is not given it.

    Raises:
        UserError: as `check`, and when a call refuses its arguments.
    """
    if type(node) in (tuple, list):  # And no object that is a tuple, such as an optimizer.
        return type(node)(instantiate(v, f'{path}[{i}]', supplied) for i, v in enumerate(node))
    if not isinstance(node, Mapping):
        return node
    if 'ref' in node and 'target' not in node:
        return _resolve_reference(node, path)
    if 'target' not in node:
        return {key: instantiate(v, f'{path}.{key}', supplied) for key, v in node.items()}
    target = objects.resolve(node['target'], f'{path}.target')
    _check_arguments(target, node, path)
    args = instantiate(tuple(node.get('args', ())), f'{path}.args', supplied)
    given = {k: v for k, v in node.items() if k not in RESERVED}
    kwargs = {k: instantiate(v, f'{path}.{k}', supplied) for k, v in given.items()}
    known, _ = arguments(target)
    for key in set(given) & set(known):
        kwargs[key] = words.resolve_word(kwargs[key], known[key], f'{path}.{key}')
    if supplied:
        kwargs = {**{k: v for k, v in supplied.items() if k in known}, **kwargs}
    try:
        return target(*args, **kwargs)
    except UserError:
        raise
    except _REFUSALS as error:
        raise UserError(
            f'{path}: {node["target"]} refused its arguments: {_error_text(error)}'
            f'{_hint(given, known, path)}'
        ) from error


def _hint(given: Mapping[str, Any], known: Mapping[str, inspect.Parameter], path: str) -> str:
    """Says where a number was given as text, or a dict names no object."""
    for key, value in given.items():
        if isinstance(value, str) and re.fullmatch(r'[-+]?\d+(\.\d*)?(e[-+]?\d+)?', value):
            unit = (
                f'a length of time has a unit ({shorten(value, 30)} steps), '
                if value.isdigit()
                else ''
            )
            return (
                f'\n{path}.{key} is the text {short_repr(value)}: {unit}a number has no quotation '
                'marks'
            )
        takes_dict = key in known and 'Mapping' in str(known[key].annotation)
        if isinstance(value, Mapping) and not takes_dict and not {'target', 'ref'} & set(value):
            return f"\n{path}.{key} is a dict that names no object: it has no 'target'"
    return ''


def _error_text(error: Exception) -> str:
    """What a target says of its arguments, and where, if it did not mean to."""
    if isinstance(error, ValueError):
        said = str(error)
    elif isinstance(error, TypeError):
        said = f'{error}{objects.error_location(error)}'
    else:
        said = objects.last_line(error)
    # It may repeat what it was given, however long that is.
    return '\n'.join([shorten(said, 300), *getattr(error, '__notes__', ())])


def accepted_keys(target_name: str, keys: Mapping[str, Any], path: str) -> set[str]:
    """Returns those of `keys` that are arguments of the named target."""
    parameters, open_ended = arguments(objects.resolve(target_name, f'{path}.target'))
    return {key for key in keys if open_ended or key in parameters or key in RESERVED}


def _resolve_reference(node: Mapping[str, Any], path: str) -> Any:
    extra = [key for key in node if key != 'ref']
    if extra:
        raise UserError(f"{path}.{extra[0]}: a 'ref' names an object and takes no other key")
    return objects.resolve(node['ref'], f'{path}.ref')


def _check_arguments(target: Any, node: Mapping[str, Any], path: str) -> None:
    if not callable(target):
        raise UserError(f"{path}.target: {node['target']} is not callable; to name it, use 'ref'")
    parameters, open_ended = arguments(target)
    if not isinstance(node.get('args', ()), (tuple, list)):
        raise UserError(f'{path}.args: expected a tuple, got {short_repr(node["args"])}')
    keys = [key for key in node if key not in RESERVED]
    unknown = [key for key in keys if key not in parameters]
    if unknown and not (open_ended and node.get('accepts_any')):
        raise UserError(_unknown_argument(target, node, unknown[0], path))
    positional = [
        p.name for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY
    ][: len(tuple(node.get('args', ())))]
    twice = [key for key in keys if key in positional]
    if twice:
        raise UserError(f'{path}.{twice[0]} is given twice: by name and in {path}.args')
    missing = [
        p.name
        for p in parameters.values()
        if p.default is inspect.Parameter.empty
        and p.name not in {*keys, *positional, *FRAMEWORK_SUPPLIED}
    ]
    if missing:
        hint = ''
        if inspect.isroutine(target) and not keys and not positional:
            hint = f". To pass the function itself, write dict(ref='{node['target']}')"
        raise UserError(
            f'{path}.{missing[0]} is missing: {node["target"]} has no default for it{hint}'
        )
    for key in keys:
        if key in parameters:
            words.resolve_word(node[key], parameters[key], f'{path}.{key}')


def _unknown_argument(target: Any, node: Mapping[str, Any], key: str, path: str) -> str:
    parameters, open_ended = arguments(target)
    if open_ended:
        return (
            f'{path}.{key}: {node["target"]} takes **kwargs, so the name cannot be checked; '
            f'add {path}.accepts_any=True if it is right'
        )
    near = suggest.nearest_name(key, parameters)
    takes = visible_arguments(parameters)
    if near:
        hint = f'Did you mean {path}.{near}?'
    elif takes:
        hint = f'It takes: {", ".join(takes)}.'
    else:
        hint = _no_names_hint(target, node, key, path)
    return f'{path}.{key}: {node["target"]} takes no argument {short_repr(key)}. {hint}'


def _no_names_hint(target: Any, node: Mapping[str, Any], key: str, path: str) -> str:
    kinds = {parameter.kind for parameter in inspect.signature(target).parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return 'It takes none.'
    having = [
        f'{path}.args[{index}].{key}'
        for index, part in enumerate(node.get('args', ()))
        if isinstance(part, Mapping) and key in part
    ]
    hint = f'It takes positional arguments only, in {path}.args'
    return f'{hint}. Did you mean {having[0]}?' if having else f'{hint}, such as args[0].{key}.'
