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
from trainer.config.errors import UserError, error_location, short_repr, shorten
from trainer.config.signatures import arguments

# Arguments that the framework or the module library supplies, so that a config may omit them.
FRAMEWORK_SUPPLIED = frozenset({'rngs', 'train', 'training', 'is_training', 'deterministic'})

# Keys of an object's dict that are not arguments.
RESERVED = frozenset({'target', 'args', 'accepts_any'})

# Errors that a target raises for a wrong argument. Others are failures of the program, which need a
# traceback.
_ARGUMENT_ERRORS = (
    TypeError,
    ValueError,
    LookupError,
    AssertionError,
    ImportError,
    FileNotFoundError,
)


class MissingArgument(UserError):
    """A config omits an argument that its target has no default for."""


class RefusedArguments(UserError):
    """A target raised an error about its arguments, which is the cause of this one.

    Attributes:
        who: the config path and the name of the target.
    """

    def __init__(self, who: str, reason: str):
        super().__init__(f'{who} refused its arguments: {reason}')
        self.who = who


def evaluate_annotation(annotation: str, target: Any) -> Any:
    """Returns the type that the text of an annotation names, None if it cannot be evaluated.

    Args:
        annotation: the text of a parameter's annotation.
        target: the callable; the names are those of the module that defines it.
    """
    while isinstance(target, functools.partial):
        target = target.func
    target = inspect.unwrap(target) if callable(target) else target
    # A field of a dataclass may be inherited from a base in another module.
    owners = target.__mro__ if inspect.isclass(target) else (target,)
    for owner in owners:
        # Names such as `Sequence` are often imported for type checkers only (`TYPE_CHECKING`). The
        # module comes last, so that its own names take precedence.
        scope = {
            **vars(typing),
            **vars(collections.abc),
            **vars(sys.modules.get(getattr(owner, '__module__', ''), typing)),
        }
        # Of one annotation at a time: `get_type_hints(owner)` fails if any of them does.
        holder = types.SimpleNamespace(__annotations__={'it': annotation})
        with contextlib.suppress(Exception):  # Evaluating arbitrary text may raise anything.
            return typing.get_type_hints(holder, globalns=scope)['it']
    return None


def visible_arguments(parameters: Mapping[str, Any]) -> list[str]:
    """Returns the arguments to list in a message: all but those of the framework and Linen."""
    # Linen adds both of these fields to every module; `name` alone is an argument like any other.
    linen_fields = {'parent', 'name'} if 'parent' in parameters else set()
    return [name for name in parameters if name not in FRAMEWORK_SUPPLIED | linen_fields]


def check(node: Any, path: str) -> None:
    """Imports every target in a node and checks its arguments, without calling it.

    Args:
        node: any value of a plain config.
        path: its key path, for messages.

    Raises:
        UserError: for a name that does not exist, or an unknown or missing argument.
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
    """Whether any target in a node has an argument with a name that the node does not set."""
    if isinstance(node, (tuple, list)):
        return any(takes_argument(value, name, f'{path}[{i}]') for i, value in enumerate(node))
    if not isinstance(node, Mapping):
        return False
    target = node.get('target')
    takes = target is not None and name in arguments(objects.resolve(target, f'{path}.target'))[0]
    return (takes and name not in node) or any(
        takes_argument(v, name, f'{path}.{k}') for k, v in node.items()
    )


def instantiate(node: Any, path: str, supplied: Mapping[str, Any] | None = None) -> Any:
    """Returns a value of a config with all objects in it created, at every depth.

    Args:
        node: a dict with 'target' or 'ref', a container of such, or any other value.
        path: its key path, for messages.
        supplied: arguments for every target that takes them and does not set them.

    Raises:
        UserError: as `check`, and if a target raises an error about its arguments.
    """
    if type(node) in (tuple, list):  # Not an object that is a tuple, such as an optimizer.
        return type(node)(instantiate(v, f'{path}[{i}]', supplied) for i, v in enumerate(node))
    if not isinstance(node, Mapping):
        return node
    if 'ref' in node and 'target' not in node:
        return _resolve_reference(node, path)
    if 'target' not in node:
        return {key: instantiate(v, f'{path}.{key}', supplied) for key, v in node.items()}
    target = objects.resolve(node['target'], f'{path}.target')
    # Before anything inside is created: that may take long, or have side effects.
    _check_arguments(target, node, path)
    args = instantiate(tuple(node.get('args', ())), f'{path}.args', supplied)
    given = {k: v for k, v in node.items() if k not in RESERVED}
    kwargs = {k: instantiate(v, f'{path}.{k}', supplied) for k, v in given.items()}
    parameters, _ = arguments(target)
    for key in set(given) & set(parameters):
        kwargs[key] = words.resolve_word(kwargs[key], parameters[key], f'{path}.{key}')
    # The arguments of the config take precedence.
    if supplied:
        kwargs = {**{k: v for k, v in supplied.items() if k in parameters}, **kwargs}
    try:
        return target(*args, **kwargs)
    except UserError:
        raise
    except _ARGUMENT_ERRORS as error:
        raise RefusedArguments(
            f'{path}: {node["target"]}', f'{_error_text(error)}{_hint(given, parameters, path)}'
        ) from error


def _hint(given: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], path: str) -> str:
    """Returns a hint about a number that is given as text, or a dict without a target, or ''."""
    for key, value in given.items():
        if isinstance(value, str) and re.fullmatch(r'[-+]?\d+(\.\d*)?(e[-+]?\d+)?', value):
            unit = (
                f"; a duration has a unit ('{shorten(value, 30)} steps')" if value.isdigit() else ''
            )
            return (
                f'\n{path}.{key} is the text {short_repr(value)}: write a number without quotation '
                f'marks{unit}'
            )
        takes_dict = key in parameters and 'Mapping' in str(parameters[key].annotation)
        if isinstance(value, Mapping) and not takes_dict and not {'target', 'ref'} & set(value):
            return f"\n{path}.{key} is a dict without a 'target', and so does not become an object"
    return ''


def _error_text(error: Exception) -> str:
    """Returns the text of an error that a target raised, with its location where that helps."""
    # A ValueError is usually raised on purpose, with a complete text. The others may as well come
    # from a line that did not expect the argument, so the line is shown.
    if isinstance(error, ValueError):
        text = str(error)
    elif isinstance(error, TypeError):
        text = f'{error}{error_location(error)}'
    else:
        text = objects.last_line(error)
    # A line may quote an argument of any length; the last lines may say how to fix it.
    lines = [shorten(line, 300) for line in text.split('\n')]
    return '\n'.join([*lines, *getattr(error, '__notes__', ())])


def accepted_keys(target_name: str, keys: Mapping[str, Any], path: str) -> set[str]:
    """Returns the keys that are valid in the dict of an object with a target.

    Args:
        target_name: 'package.module:Name'.
        keys: the keys in question.
        path: key path of the object, for messages.
    """
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
    # The parameters that the elements of `args` fill, by their order.
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
        # A function without any argument was probably to be passed, not called.
        if inspect.isroutine(target) and not keys and not positional:
            hint = f". To pass the function itself, write dict(ref='{node['target']}')"
        raise MissingArgument(
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
    nearest = suggest.nearest_name(key, parameters)
    names = visible_arguments(parameters)
    if nearest:
        hint = f'Did you mean {path}.{nearest}?'
    elif names:
        hint = f'It takes: {", ".join(names)}.'
    else:
        hint = _no_names_hint(target, node, key, path)
    return f'{path}.{key}: {node["target"]} takes no argument {short_repr(key)}. {hint}'


def _no_names_hint(target: Any, node: Mapping[str, Any], key: str, path: str) -> str:
    """Returns a hint for a target without named arguments, such as `optax:chain`."""
    kinds = {parameter.kind for parameter in inspect.signature(target).parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return 'It takes none.'
    # `optimizer.learning_rate` of a chain may mean that of one of its parts.
    paths = [
        f'{path}.args[{index}].{key}'
        for index, part in enumerate(node.get('args', ()))
        if isinstance(part, Mapping) and key in part
    ]
    hint = f'It takes positional arguments only, in {path}.args'
    return f'{hint}. Did you mean {paths[0]}?' if paths else f'{hint}, such as args[0].{key}.'
