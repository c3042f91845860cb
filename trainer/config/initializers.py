# SPDX-License-Identifier: Apache-2.0
"""Resolves initializers that a config gives by name, as in `bias_init='ones'`."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from trainer.config import objects, suggest
from trainer.config.errors import UserError, short_repr

# Most functions there make an initializer: they are named by a target, and not by a ref.
PLACES = ('flax.linen.initializers', 'flax.nnx.initializers', 'jax.nn.initializers')

# Whose functions are no initializers.
_OTHERS = ('jax.nn', 'flax.linen', 'jax.numpy')


def is_factory(function: Any) -> bool:
    """Whether a function of one of `PLACES` makes an initializer, and is not one itself."""
    return 'key' not in inspect.signature(function).parameters


def from_name(value: Any, default: Any, path: str, *, must: bool) -> Any:
    """Returns the initializer that a word names beside the default.

    Args:
        value: of a config.
        default: of the argument that it is for.
        path: config path of the value, for messages.
        must: whether anything else is wrong; otherwise an unknown word is returned as it is.

    Raises:
        UserError: if the value names none, with how to write what it probably means.
    """
    home = next((p for p in PLACES if any(f is default for f in _functions(p).values())), None)
    if isinstance(value, str):
        found = _functions(home).get(value) if home else None
        if found is not None and not is_factory(found):
            return found
        if re.fullmatch(r'[\w.]+:[\w.]+', value):
            return objects.resolve(value, path)
    word = str(value).rpartition('.')[2]
    names = {name: place for place in reversed(PLACES) for name in _functions(place)}
    meant = word if word in names else suggest.nearest_name(word, names, cutoff=0.7)
    elsewhere = any(callable(getattr(sys.modules.get(other), word, None)) for other in _OTHERS)
    if meant is None and not must and not elsewhere:
        return value  # The target may know what to do with it.
    text = f'{path}: expected an initializer, got {short_repr(value)}.'
    if meant is not None and meant != word:
        text = f'{text} Did you mean {meant!r}?'
    name = meant or 'lecun_normal'
    place = names.get(name, PLACES[0])
    is_made = meant is None or is_factory(_functions(place)[name])
    raise UserError(
        f'{text} {naming_hint("target" if is_made else "ref", f"{place}:{name}", path)}'
    )


def naming_hint(key: str, name: str, path: str) -> str:
    """Returns how a config file and the command line name a function by its module."""
    shell = f'--{path}=\'{{"{key}": "{name}"}}\''
    return f'Name it by its module, as in dict({key}={name!r}); on the command line, {shell}'


def _functions(place: str) -> dict[str, Any]:
    """Returns the public functions of a module by name; none if it is not imported."""
    module = sys.modules.get(place)
    found = vars(module).items() if module is not None else ()
    return {n: each for n, each in found if n[0] != '_' and inspect.isfunction(each)}
