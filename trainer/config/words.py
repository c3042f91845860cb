# SPDX-License-Identifier: Apache-2.0
"""Resolves functions, classes and dtypes that a config gives by name, as `activation='gelu'`."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from trainer import compat
from trainer.config import dtypes, initializers, objects
from trainer.config.errors import UserError, short_repr

# A word means what the first of these calls so that has the argument's default, too. In other
# modules the neighbours of a function do not do the same job.
_HOMES = ('jax.nn', 'flax.linen', 'flax.nnx', 'jax.numpy', 'optax')

# Annotations of what is called, of dtypes, and of objects that are made.
_CALLED = {'Callable', 'type', 'Type', 'Initializer', 'ModuleDef'}
_MADE = {'Module', 'GradientTransformation', 'GradientTransformationExtraArgs', 'Schedule'}
_NONE = {'None', 'NoneType'}
# Text and numbers of what types an annotation names; JAX's annotation of dtypes includes texts.
_NUMBERS: dict[type, tuple[str, ...]] = {
    bool: ('bool',), int: ('int', 'float', 'complex'), float: ('float', 'complex')
}  # fmt: skip
_DTYPES = {'Dtype', 'DType', 'dtype', 'DTypeLike', 'SupportsDType'}


def resolve_word(value: Any, parameter: inspect.Parameter, path: str) -> Any:
    """Returns the function, class or dtype that a word names; any other value as it is.

    Args:
        value: of a config, for the parameter.
        parameter: of a target.
        path: config path of the value, for messages.

    Raises:
        UserError: if the parameter takes a function or a dtype, and the value names none.
    """
    if not isinstance(value, (str, bool, int, float)):
        return value
    kinds, default = _annotation_names(parameter.annotation), parameter.default
    if _is_allowed(value, kinds):
        return value
    if dtypes.is_dtype(default) or kinds & _DTYPES:
        must = dtypes.is_dtype(default) or kinds <= _DTYPES | _NONE
        return dtypes.from_name(value, default, path, must=must)
    if kinds & _MADE and kinds <= _MADE | _NONE:
        raise UserError(_not_an_object_text(value, path))
    if not (_is_callable(default) or _takes_only_callables(kinds)):
        return value
    if 'Initializer' in kinds or compat.is_initializer(default):
        return initializers.from_name(value, default, path, must=_takes_only_callables(kinds))
    return _resolve_function(value, default, path, must=_takes_only_callables(kinds))


def _is_allowed(value: Any, kinds: set[str]) -> bool:
    """Whether an annotation allows a text or number as such, or False for what is left out."""
    if value is False and kinds & _NONE and not kinds & _DTYPES:
        return True
    return bool(kinds & {'str', *_NUMBERS.get(type(value), ())})


def _resolve_function(value: Any, default: Any, path: str, *, must: bool) -> Any:
    homes = _modules_of(default)
    if isinstance(value, str):
        for home in homes:
            found = getattr(home, value, None)
            if _is_callable(found) and inspect.isclass(found) == inspect.isclass(default):
                return found
        if re.fullmatch(r'[\w.]+:[\w.]+', value):
            return objects.resolve(value, path)
    near = _near_names(value, homes, inspect.isclass(default)) if isinstance(value, str) else []
    if not must and not near:
        return value  # The target may know what to do with it.
    raise UserError(_not_a_function_text(value, default, path, near))


def _not_a_function_text(value: Any, default: Any, path: str, near: list[str]) -> str:
    what = 'class' if inspect.isclass(default) else 'function'
    name = _public_name(default)
    like = f' such as {name} (its default)' if name else ''
    text = f'{path}: expected a {what}{like}, got {short_repr(value)}.'
    if near:
        return f'{text} Did you mean {" or ".join(map(repr, near))}?'
    key, name = _guess_full_name(str(value))
    return f'{text} {initializers.naming_hint(key, name, path)}'


def _not_an_object_text(value: Any, path: str) -> str:
    _, name = _guess_full_name(str(value))
    return (
        f'{path}: expected an object, got {short_repr(value)}. Describe how it is made, as in '
        f'dict(target={name!r}, ...)'
    )


def _guess_full_name(word: str) -> tuple[str, str]:
    """Returns 'ref' or 'target', and the full name of what a word may be, or an example of one."""
    word = word.rpartition('.')[2]
    for place in (*initializers.PLACES, *_HOMES):
        found = getattr(sys.modules.get(place), word, None)
        if found is not None and callable(found):
            makes = place in initializers.PLACES and initializers.is_factory(found)
            return ('target' if makes else 'ref'), f'{place}:{word}'
    return 'ref', 'package.module:name'


def _near_names(word: str, homes: list[Any], is_class: bool) -> list[str]:
    """Returns names in one of the modules that are like a word, or that end it: 'nn.gelu'."""
    word = word.rpartition('.')[2]
    for home in homes:
        names = [
            name for name, each in _public_callables(home) if inspect.isclass(each) == is_class
        ]
        if word in names:
            return [word]
        if near := difflib.get_close_matches(word, names, n=3, cutoff=0.7):
            return near
    return []


def _modules_of(default: Any) -> list[Any]:
    """Returns the modules that have a function or class under its own name."""
    if not _is_callable(default):
        return []
    modules = [sys.modules[name] for name in _HOMES if name in sys.modules]
    return [m for m in modules if any(each is default for _, each in _public_callables(m))][:1]


def _public_name(default: Any) -> str | None:
    for home in _modules_of(default):
        return next(
            f'{home.__name__}:{n}' for n, each in _public_callables(home) if each is default
        )
    return None


def _public_callables(module: Any) -> Iterator[tuple[str, Any]]:
    for name, each in list(vars(module).items()):
        if not name.startswith('_') and _is_callable(each):
            yield name, each


def _is_callable(value: Any) -> bool:
    return callable(value) and value is not inspect.Parameter.empty


def _takes_only_callables(kinds: set[str]) -> bool:
    return bool(kinds & _CALLED) and kinds <= _CALLED | _NONE


def _annotation_names(annotation: Any) -> set[str]:
    """Returns {'Callable', 'None'} for the annotation `Callable[..., Any] | None`."""
    if annotation is inspect.Parameter.empty:
        return set()
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    while union := re.fullmatch(r'(?:typing\.)?(?:Optional|Union)\[(.*)\]', text.strip()):
        text = union[1]
    before = None
    while before != text:
        before, text = text, re.sub(r'\[[^\[\]]*\]', '', text)
    kinds = {part.strip().rpartition('.')[2] for part in re.split(r'[|,]', text)}
    # The union that `DTypeLike` is short for, of which Flax makes one with Any.
    return kinds - {'str', 'type', 'Any'} if 'SupportsDType' in kinds else kinds
