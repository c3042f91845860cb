# SPDX-License-Identifier: Apache-2.0
"""Resolves initializers that a config gives by name, as in `bias_init='ones'`."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from trainer.config import objects, suggest
from trainer.config.errors import UserError, short_repr

# Modules of initializers. Most of their functions return an initializer, so a config calls them
# with `target`; a few, such as `ones`, are initializers, which a config names with `ref`.
MODULES = ('flax.linen.initializers', 'flax.nnx.initializers', 'jax.nn.initializers')

# Modules with other functions: a name of theirs is certainly wrong for an initializer.
_OTHER_MODULES = ('jax.nn', 'flax.linen', 'jax.numpy')


def is_factory(function: Any) -> bool:
    """Whether a function of one of `MODULES` returns an initializer, rather than being one."""
    # An initializer is a function (key, shape, dtype).
    return 'key' not in inspect.signature(function).parameters


def from_name(value: Any, default: Any, path: str, *, must: bool) -> Any:
    """Returns the initializer with a name, from the module of the default.

    Args:
        value: the value in the config, such as 'he_normal'.
        default: default of the argument.
        path: key path of the value, for messages.
        must: whether the argument must be an initializer; otherwise a value that resembles none is
            returned unchanged.

    Raises:
        UserError: if there is no such initializer; the message says how to write the nearest one.
    """
    module = next((m for m in MODULES if any(f is default for f in _functions(m).values())), None)
    if isinstance(value, str):
        function = _functions(module).get(value) if module else None
        if function is not None and not is_factory(function):
            return function
        if re.fullmatch(r'[\w.]+:[\w.]+', value):
            return objects.resolve(value, path)
    word = str(value).rpartition('.')[2]
    # Reversed, so that of modules with the same function the first one gets the name.
    modules = {name: module for module in reversed(MODULES) for name in _functions(module)}
    nearest = word if word in modules else suggest.nearest_name(word, modules, cutoff=0.7)
    is_other = any(callable(getattr(sys.modules.get(m), word, None)) for m in _OTHER_MODULES)
    if nearest is None and not must and not is_other:
        return value  # The target may have names of its own.
    text = f'{path}: expected an initializer, got {short_repr(value)}.'
    if nearest is not None and nearest != word:
        text = f'{text} Did you mean {nearest!r}?'
    name = nearest or 'lecun_normal'
    module = modules.get(name, MODULES[0])
    is_called = nearest is None or is_factory(_functions(module)[name])
    hint = naming_hint('target' if is_called else 'ref', f'{module}:{name}', path)
    raise UserError(f'{text} {hint}')


def naming_hint(key: str, name: str, path: str) -> str:
    """Returns how to name a function with its module, in a config file and on the command line."""
    shell = f'--{path}=\'{{"{key}": "{name}"}}\''
    return f'Name it with its module, as in dict({key}={name!r}); on the command line, {shell}'


def _functions(module_name: str) -> dict[str, Any]:
    """Returns the public functions of a module by name; empty if it is not imported."""
    module = sys.modules.get(module_name)
    members = vars(module).items() if module is not None else ()
    return {name: x for name, x in members if name[0] != '_' and inspect.isfunction(x)}
