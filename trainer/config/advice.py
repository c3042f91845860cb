# SPDX-License-Identifier: Apache-2.0
"""Advice on what to write in place of a value that a config cannot contain."""

from __future__ import annotations

import datetime
import enum
import fractions
import functools
import inspect
import math
import numbers
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from trainer.config import misplaced
from trainer.config.errors import short_repr

# Modules where the public name of a library's function or class is looked up, besides its own
# package: `jax._src.nn.functions:relu` is `jax.nn:relu`.
_PUBLIC = (
    *('jax.nn', 'jax.numpy', 'flax.linen', 'flax.nnx', 'optax', 'jax.nn.initializers'),
    *('trainer.sharding', 'trainer.schedules', 'trainer.metrics'),
)
# Arrays of up to this many elements can be written as a tuple.
_MAX_ELEMENTS = 8


def advice(value: Any, path: str = '') -> str:
    """Returns how to write a value, as part of a sentence: "write it as text: '/a/b'".

    Args:
        value: a value that a config cannot contain.
        path: its key path, for messages.
    """
    # '<' is in '<lambda>' and 'f.<locals>.g', which cannot be imported by name.
    is_importable = hasattr(value, '__qualname__') and '<' not in value.__qualname__
    if path.endswith(('.target', '.ref')) and is_importable and public_name(value).count(':') == 1:
        # `dict(target=optax.adam)` needs quotation marks only, not another dict(ref=...) inside.
        return f'write its name: {public_name(value)!r}'
    for kinds, advise in _ADVICE:
        if isinstance(value, kinds):
            return advise(value)
    # Before classes: `jnp.float32` is callable, but means a dtype.
    if _dtype_name(value) is not None:
        return f'write the name of the dtype: {_dtype_name(value)!r}'
    if inspect.isclass(value) or (callable(value) and hasattr(value, '__qualname__')):
        return _callable_advice(value)
    if hasattr(value, 'dtype') and hasattr(value, 'shape'):
        return _array_advice(value)
    if isinstance(value, tuple):  # A named tuple, such as an optimizer; plain ones are allowed.
        return _named_tuple_advice(value)
    return _object_advice(value)


def is_value(value: Any) -> bool:
    """Whether a value is data (a number, a date, an array) and no class, function or component."""
    kinds = tuple(
        kind
        for listed, _ in _ADVICE
        for kind in (listed if isinstance(listed, tuple) else (listed,))
        if kind is not functools.partial
    )
    if isinstance(value, kinds):
        return True
    # A class, such as `jnp.float32`, may have these attributes too.
    is_array = hasattr(value, 'dtype') and hasattr(value, 'shape')
    return not inspect.isclass(value) and (is_array or _dtype_name(value) is not None)


def _path_advice(path: os.PathLike[str]) -> str:
    return f'write it as text: {str(path)!r}'


def _enum_advice(member: enum.Enum) -> str:
    full_name = f'{public_name(type(member))}.{member.name}'
    is_plain = isinstance(member.value, (bool, int, float, str))
    value = f'its value, {member.value!r}, or ' if is_plain else ''
    return f'write {value}its name, {member.name!r}, or name the member: dict(ref={full_name!r})'


def _partial_advice(partial: functools.partial[Any]) -> str:
    keywords = ''.join(f', {key}={short_repr(x)}' for key, x in partial.keywords.items())
    args = f'dict(ref={public_name(partial.func)!r}),' + ''.join(
        f' {short_repr(x)},' for x in partial.args
    )
    return (
        f"write dict(target='functools:partial', args=({args.rstrip(',')},){keywords}, "
        'accepts_any=True), or name a function of a module: dict(ref=...)'
    )


def _call_advice(value: Any) -> str:
    """Returns advice for a slice or range, which is written as the call that makes it."""
    args = value.__reduce__()[1]
    return f"write dict(target='builtins:{type(value).__name__}', args={args!r})"


def _complex_advice(value: complex) -> str:
    return f"write dict(target='builtins:complex', args=({value.real!r}, {value.imag!r}))"


def _set_advice(value: Any) -> str:
    ordered = tuple(sorted(value, key=repr))
    # The order of a set of strings changes from process to process, and processes compare configs.
    return f'write a tuple, whose order is fixed: {short_repr(ordered)}'


def _bytes_advice(value: bytes) -> str:
    return f'write text: {short_repr(value.decode(errors="replace"))}'


def _number_advice(value: Any) -> str:
    is_integer = isinstance(value, numbers.Integral)
    return f'write a plain number: {int(value) if is_integer else float(value)!r}'


def _time_advice(value: Any) -> str:
    return f"write text: {str(value)!r}. A duration is written as '10 epochs' or '2000 steps'"


def _module_advice(value: types.ModuleType) -> str:
    return f'name an object of the module: dict(ref={value.__name__ + ":name"!r})'


def _pattern_advice(value: re.Pattern[Any]) -> str:
    return f'write the pattern as text: {value.pattern!r}'


def _iterator_advice(value: Any) -> str:
    return "write a tuple, or name the function that returns it: dict(target='package.module:name')"


def _callable_advice(value: Any) -> str:
    kind, module = 'class' if inspect.isclass(value) else 'function', value.__module__ or ''
    # Nothing can import a config file by its name.
    in_config_file = module.startswith(misplaced.CONFIG_PREFIX)
    outer = value.__qualname__.partition('.<locals>')[0]
    # A lambda within a library function is different: that function's call can be described.
    if value.__qualname__.endswith('<lambda>') and (in_config_file or outer.endswith('<lambda>')):
        return (
            'give it a name: define it as a function in a module, and write '
            "dict(ref='package.module:name')"
        )
    # A bound method depends on its object, which no name leads to.
    if not module or (getattr(value, '__self__', None) is not None and module != 'builtins'):
        return (
            'write a function that calls it, in a module of yours, and name that: '
            "dict(ref='package.module:name')"
        )
    if in_config_file:
        return (
            f'define the {kind} in a module that can be imported, not in the config file, and '
            f"write dict(ref='package.module:{value.__name__}')"
        )
    if '<locals>' in value.__qualname__:
        factory = _importable_name(module, outer)
        return f'describe the call that returns it: dict(target={factory!r}, ...)'
    name = public_name(value)
    return f'name it: dict(ref={name!r}), or, to call it, dict(target={name!r}, ...)'


def _array_advice(value: Any) -> str:
    # The dtype of a JAX random key is 'key<fry>' or similar.
    if str(value.dtype).startswith('key<'):
        return 'write a seed, a plain integer'
    if value.shape == ():
        return f'write a plain number: {value.item()!r}'
    if math.prod(value.shape) <= _MAX_ELEMENTS:
        return f'write a tuple or a list: {value.tolist()!r}'
    return (
        "name a function that returns it: dict(target='package.module:make'), or add it to the data"
    )


def _named_tuple_advice(value: Any) -> str:
    # An Optax optimizer is a pair of functions, which does not say what call returned it.
    if type(value).__module__.partition('.')[0] == 'optax':
        return (
            "describe the call that returns it: dict(target='optax:adam', learning_rate=0.001), or "
            "dict(target='optax:chain', args=(...))"
        )
    fields = ', '.join(getattr(value, '_fields', ()))
    name = public_name(type(value))
    return f'describe the call that makes it: dict(target={name!r}, ...) with {fields}'


def _object_advice(value: Any) -> str:
    name = public_name(type(value))
    return f'describe the call that makes it: dict(target={name!r}, ...), with its arguments'


def _dtype_name(value: Any) -> str | None:
    """Returns 'float32' for a dtype, or a class that represents one; None for anything else."""
    import numpy as np  # Importing takes 0.1 s, and most commands do not need it.

    if isinstance(value, np.dtype):
        return value.name
    if inspect.isclass(value) and issubclass(value, np.generic):
        return np.dtype(value).name
    # `jnp.float32` is not a subclass of NumPy's type, but has its dtype as an attribute.
    dtype = getattr(value, 'dtype', None) if inspect.isclass(value) else None
    return dtype.name if isinstance(dtype, np.dtype) else None


def public_name(value: Any) -> str:
    """Returns the 'package.module:name' of a function or class, its public name if it has one."""
    module, name = getattr(value, '__module__', None), getattr(value, '__qualname__', None)
    return _importable_name(module, name) if module and name else 'package.module:name'


def _importable_name(module: str, name: str) -> str:
    """Returns 'optax:adam' for a function that is defined as `adam` in `optax._src.alias`."""
    # The config file itself, which cannot be imported.
    if module.startswith(misplaced.CONFIG_PREFIX):
        return f'package.module:{name}'
    value, parts = _find_attribute(module, name), module.split('.')
    parents = ['.'.join(parts[:count]) for count in range(1, len(parts))]
    for public in (*(p for p in parents if '._' not in p), *_PUBLIC):
        # The same object, not just the same name: `jax.numpy` and NumPy share many names.
        if value is not None and _find_attribute(public, name) is value:
            return f'{public}:{name}'
    return f'{module}:{name}'


def _find_attribute(module: str, name: str) -> Any:
    # Only modules that are imported already: a message must not import anything.
    value: Any = sys.modules.get(module)
    for part in name.split('.'):
        value = getattr(value, part, None)
    return value


# The first match counts: Fraction and complex numbers are Numbers too, and an IntEnum is an int.
_ADVICE: tuple[tuple[Any, Callable[[Any], str]], ...] = (
    (enum.Enum, _enum_advice),
    (os.PathLike, _path_advice),
    (functools.partial, _partial_advice),
    ((slice, range), _call_advice),
    ((set, frozenset), _set_advice),
    ((bytes, bytearray), _bytes_advice),
    ((datetime.date, datetime.time, datetime.timedelta), _time_advice),
    (types.ModuleType, _module_advice),
    (re.Pattern, _pattern_advice),
    (Iterator, _iterator_advice),
    (fractions.Fraction, _number_advice),
    (complex, _complex_advice),
    (numbers.Number, _number_advice),
)
