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

# A name is looked up in the first of these modules that contains the argument's default. Only in
# these do functions of one module do similar jobs, so that one can replace another.
_MODULES = ('jax.nn', 'flax.linen', 'flax.nnx', 'jax.numpy', 'optax')

# Names in annotations of callables, of objects that a config describes, and of dtypes.
_CALLABLES = {'Callable', 'type', 'Type', 'Initializer', 'ModuleDef'}
_OBJECTS = {'Module', 'GradientTransformation', 'GradientTransformationExtraArgs', 'Schedule'}
_DTYPES = {'Dtype', 'DType', 'dtype', 'DTypeLike', 'SupportsDType'}
_NONE = {'None', 'NoneType'}
# The annotations that allow a number of each type.
_NUMBERS: dict[type, tuple[str, ...]] = {
    bool: ('bool',), int: ('int', 'float', 'complex'), float: ('float', 'complex')
}  # fmt: skip


def resolve_word(value: Any, parameter: inspect.Parameter, path: str) -> Any:
    """Returns the function, class or dtype that a value names; any other value unchanged.

    Args:
        value: the config value of an argument.
        parameter: the parameter that the word is given for.
        path: key path of the value, for messages.

    Raises:
        UserError: if the parameter takes a function or a dtype, and there is none with that name.
    """
    if not isinstance(value, (str, bool, int, float)):
        return value
    names, default = _annotation_names(parameter.annotation), parameter.default
    # An annotation such as `str | Callable` leaves the name to the target.
    if _is_allowed(value, names):
        return value
    if dtypes.is_dtype(default) or names & _DTYPES:
        must = dtypes.is_dtype(default) or names <= _DTYPES | _NONE
        return dtypes.from_name(value, default, path, must=must)
    if names & _OBJECTS and names <= _OBJECTS | _NONE:
        raise UserError(_not_an_object_text(value, path))
    if not (_is_callable(default) or _takes_only_callables(names)):
        return value
    if 'Initializer' in names or compat.is_initializer(default):
        return initializers.from_name(value, default, path, must=_takes_only_callables(names))
    return _resolve_function(value, default, path, must=_takes_only_callables(names))


def _is_allowed(value: Any, names: set[str]) -> bool:
    """Whether an annotation allows a text or number as it is."""
    # For `norm: Callable | None`, False means None: the part is left out.
    if value is False and names & _NONE and not names & _DTYPES:
        return True
    return bool(names & {'str', *_NUMBERS.get(type(value), ())})


def _resolve_function(value: Any, default: Any, path: str, *, must: bool) -> Any:
    modules = _modules_of(default)
    if isinstance(value, str):
        for module in modules:
            function = getattr(module, value, None)
            # A class cannot replace a function: calling it makes an object.
            if _is_callable(function) and inspect.isclass(function) == inspect.isclass(default):
                return function
        if re.fullmatch(r'[\w.]+:[\w.]+', value):
            return objects.resolve(value, path)
    near = _near_names(value, modules, inspect.isclass(default)) if isinstance(value, str) else []
    if not must and not near:
        return value  # The target may have names of its own.
    raise UserError(_not_a_function_text(value, default, path, near))


def _not_a_function_text(value: Any, default: Any, path: str, near: list[str]) -> str:
    kind = 'class' if inspect.isclass(default) else 'function'
    name = _public_name(default)
    example = f' such as {name} (its default)' if name else ''
    text = f'{path}: expected a {kind}{example}, got {short_repr(value)}.'
    if near:
        return f'{text} Did you mean {" or ".join(map(repr, near))}?'
    key, name = _guess_full_name(str(value))
    return f'{text} {initializers.naming_hint(key, name, path)}'


def _not_an_object_text(value: Any, path: str) -> str:
    _, name = _guess_full_name(str(value))
    return (
        f'{path}: expected an object, got {short_repr(value)}. Describe the call that makes it, as '
        f'in dict(target={name!r}, ...)'
    )


def _guess_full_name(word: str) -> tuple[str, str]:
    """Returns the key ('ref' or 'target') and full name that a word may mean, or an example."""
    word = word.rpartition('.')[2]
    for module in (*initializers.MODULES, *_MODULES):
        value = getattr(sys.modules.get(module), word, None)
        if value is not None and callable(value):
            is_factory = module in initializers.MODULES and initializers.is_factory(value)
            return ('target' if is_factory else 'ref'), f'{module}:{word}'
    return 'ref', 'package.module:name'


def _near_names(word: str, modules: list[Any], is_class: bool) -> list[str]:
    """Returns names of one of the modules that are similar to a word, or its last part."""
    # 'nn.gelu' is spelled right, but for its module.
    word = word.rpartition('.')[2]
    for module in modules:
        names = [n for n, each in _public_callables(module) if inspect.isclass(each) == is_class]
        if word in names:
            return [word]
        if near := difflib.get_close_matches(word, names, n=3, cutoff=0.7):
            return near
    return []


def _modules_of(default: Any) -> list[Any]:
    """Returns the first module that contains a function or class under a public name."""
    if not _is_callable(default):
        return []
    modules = [sys.modules[name] for name in _MODULES if name in sys.modules]
    return [m for m in modules if any(each is default for _, each in _public_callables(m))][:1]


def _public_name(default: Any) -> str | None:
    for module in _modules_of(default):
        names = (name for name, each in _public_callables(module) if each is default)
        return f'{module.__name__}:{next(names)}'
    return None


def _public_callables(module: Any) -> Iterator[tuple[str, Any]]:
    # A copy, because an import while this generator runs may add members to the module.
    for name, each in list(vars(module).items()):
        if not name.startswith('_') and _is_callable(each):
            yield name, each


def _is_callable(value: Any) -> bool:
    # `Parameter.empty`, the default of a parameter without one, is a class.
    return callable(value) and value is not inspect.Parameter.empty


def _takes_only_callables(names: set[str]) -> bool:
    return bool(names & _CALLABLES) and names <= _CALLABLES | _NONE


def _annotation_names(annotation: Any) -> set[str]:
    """Returns {'Callable', 'None'} for the annotation `Callable[..., Any] | None`.

    From its text: names in an annotation are often imported for type checkers only, so that it
    cannot be evaluated.
    """
    if annotation is inspect.Parameter.empty:
        return set()
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    while union := re.fullmatch(r'(?:typing\.)?(?:Optional|Union)\[(.*)\]', text.strip()):
        text = union[1]
    before = None
    # Innermost brackets first, until there are none: `Callable[[int], list[int]]`.
    while before != text:
        before, text = text, re.sub(r'\[[^\[\]]*\]', '', text)
    names = {part.strip().rpartition('.')[2] for part in re.split(r'[|,]', text)}
    # `DTypeLike` is a union that includes str, type and, in Flax, Any; it means a dtype.
    return names - {'str', 'type', 'Any'} if 'SupportsDType' in names else names
