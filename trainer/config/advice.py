# SPDX-License-Identifier: Apache-2.0
"""Advice for values that a config cannot hold: what to write instead."""

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

# Where a function or class of a library is looked for under a public name; its own package, too.
_PUBLIC = (
    *('jax.nn', 'jax.numpy', 'flax.linen', 'flax.nnx', 'optax', 'jax.nn.initializers'),
    *('trainer.sharding', 'trainer.schedules', 'trainer.metrics'),
)
_FEW = 8


def advice(value: Any, path: str = '') -> str:
    """Returns how to write a value, as a half sentence: "write it as text: '/a/b'".

    Args:
        value: that a config cannot hold.
        path: where it is in the config: a target or ref is a name already.
    """
    is_plain = hasattr(value, '__qualname__') and '<' not in value.__qualname__
    if path.endswith(('.target', '.ref')) and is_plain and public_name(value).count(':') == 1:
        return f'write its name: {public_name(value)!r}'
    for kinds, say in _KINDS:
        if isinstance(value, kinds):
            return say(value)
    if _dtype_name(value) is not None:
        return f'write the name of the dtype: {_dtype_name(value)!r}'
    if inspect.isclass(value) or (callable(value) and hasattr(value, '__qualname__')):
        return _callable_advice(value)
    if hasattr(value, 'dtype') and hasattr(value, 'shape'):
        return _array_advice(value)
    if isinstance(value, tuple):  # A named one, as optimizers are.
        return _named_tuple_advice(value)
    return _object_advice(value)


def _path_advice(path: os.PathLike[str]) -> str:
    return f'write it as text: {str(path)!r}'


def _enum_advice(member: enum.Enum) -> str:
    whole = f'{public_name(type(member))}.{member.name}'
    plain = isinstance(member.value, (bool, int, float, str))
    value = f'its value, {member.value!r}, or ' if plain else ''
    return f'write {value}its name, {member.name!r}, or name the member: dict(ref={whole!r})'


def _partial_advice(made: functools.partial[Any]) -> str:
    given = ''.join(f', {key}={short_repr(x)}' for key, x in made.keywords.items())
    args = f'dict(ref={public_name(made.func)!r}),' + ''.join(
        f' {short_repr(x)},' for x in made.args
    )
    return (
        f"write dict(target='functools:partial', args=({args.rstrip(',')},){given}, "
        'accepts_any=True), or name a function of a module: dict(ref=...)'
    )


def _call_advice(value: Any) -> str:
    """Of a value whose repr is the call of its class: slice(0, 3, None), range(0, 3)."""
    args = value.__reduce__()[1]
    return f"write dict(target='builtins:{type(value).__name__}', args={args!r})"


def _complex_advice(value: complex) -> str:
    return f"write dict(target='builtins:complex', args=({value.real!r}, {value.imag!r}))"


def _set_advice(value: Any) -> str:
    ordered = tuple(sorted(value, key=repr))
    return f'write a tuple, whose order is always the same: {short_repr(ordered)}'


def _bytes_advice(value: bytes) -> str:
    return f'write text: {short_repr(value.decode(errors="replace"))}'


def _number_advice(value: Any) -> str:
    whole = isinstance(value, numbers.Integral)
    return f'write a plain number: {int(value) if whole else float(value)!r}'


def _time_advice(value: Any) -> str:
    return f"write text: {str(value)!r}. A length of the run is '10 epochs' or '2000 steps'"


def _module_advice(value: types.ModuleType) -> str:
    return f'name what it is to be of the module: dict(ref={value.__name__ + ":name"!r})'


def _pattern_advice(value: re.Pattern[Any]) -> str:
    return f'write the pattern as text: {value.pattern!r}'


def _iterator_advice(value: Any) -> str:
    return "write a tuple, or name what makes it: dict(target='package.module:name')"


def _callable_advice(value: Any) -> str:
    kind, module = 'class' if inspect.isclass(value) else 'function', value.__module__ or ''
    own = module.startswith(misplaced.CONFIG_PREFIX)
    outer = value.__qualname__.partition('.<locals>')[0]
    if value.__qualname__.endswith('<lambda>') and (own or outer.endswith('<lambda>')):
        return (
            'give it a name: define it as a function in a module, and write '
            "dict(ref='package.module:name')"
        )
    if not module or (getattr(value, '__self__', None) is not None and module != 'builtins'):
        return "write a function of a module that calls it: dict(ref='package.module:name')"
    if own:
        return (
            f'define the {kind} in a module that can be imported, not in the config file, and '
            f"write dict(ref='package.module:{value.__name__}')"
        )
    if '<locals>' in value.__qualname__:
        maker = _importable_name(module, outer)
        return f'describe the call that makes it: dict(target={maker!r}, ...)'
    name = public_name(value)
    return f'name it: dict(ref={name!r}), or, to have it called, dict(target={name!r}, ...)'


def _array_advice(value: Any) -> str:
    if str(value.dtype).startswith('key<'):
        return 'write a seed, a plain integer'
    if value.shape == ():
        return f'write a plain number: {value.item()!r}'
    if math.prod(value.shape) <= _FEW:
        return f'write a tuple or a list: {value.tolist()!r}'
    return "make it in a function: dict(target='package.module:make'), or in the data"


def _named_tuple_advice(value: Any) -> str:
    """Of a named tuple; of those of optax it is not known which call has made them."""
    if type(value).__module__.partition('.')[0] == 'optax':
        return (
            "describe the call that makes it: dict(target='optax:adam', learning_rate=0.001), or "
            "dict(target='optax:chain', args=(...))"
        )
    fields = ', '.join(getattr(value, '_fields', ()))
    name = public_name(type(value))
    return f'describe how it is made: dict(target={name!r}, ...) with {fields}'


def _object_advice(value: Any) -> str:
    name = public_name(type(value))
    return f'describe how it is made: dict(target={name!r}, ...), with its arguments'


def _dtype_name(value: Any) -> str | None:
    """Returns 'float32' for a dtype, or a class that represents one; None for anything else."""
    import numpy as np  # Here: it takes a tenth of a second, and most commands never ask.

    if isinstance(value, np.dtype):
        return value.name
    if inspect.isclass(value) and issubclass(value, np.generic):
        return np.dtype(value).name
    found = getattr(value, 'dtype', None) if inspect.isclass(value) else None
    return found.name if isinstance(found, np.dtype) else None


def public_name(value: Any) -> str:
    """Returns the name that a ref or target has for a function or class, public if there is one."""
    module, name = getattr(value, '__module__', None), getattr(value, '__qualname__', None)
    return _importable_name(module, name) if module and name else 'package.module:name'


def _importable_name(module: str, name: str) -> str:
    """Returns 'optax:adam' for what is defined in 'optax._src.alias': where it is public."""
    if module.startswith(
        misplaced.CONFIG_PREFIX
    ):  # The config file itself, which nothing can import.
        return f'package.module:{name}'
    value, parts = _find_attribute(module, name), module.split('.')
    parents = ['.'.join(parts[:count]) for count in range(1, len(parts))]
    for place in (*(p for p in parents if '._' not in p), *_PUBLIC):
        if value is not None and _find_attribute(place, name) is value:
            return f'{place}:{name}'
    return f'{module}:{name}'


def _find_attribute(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split('.'):
        found = getattr(found, part, None)
    return found


_KINDS: tuple[tuple[Any, Callable[[Any], str]], ...] = (
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
