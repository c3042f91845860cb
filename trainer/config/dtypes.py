# SPDX-License-Identifier: Apache-2.0
"""Dtypes that a config gives by name, as in `dtype='bfloat16'`."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from trainer.config import objects, suggest, synonyms
from trainer.config.errors import UserError, short_repr

# Numpy has abbreviations of one or two characters, which are like anything.
_SHORTEST = 3


def from_name(value: Any, default: Any, path: str, *, must: bool) -> Any:
    """Returns a dtype by name as the kind of object that the default is.

    Args:
        value: of a config.
        default: of the argument that it is for.
        path: config path of the value, for messages.
        must: whether anything else is wrong; otherwise the value is returned as it is.

    Raises:
        UserError: if the argument must be a dtype, and the value names none.
    """
    import numpy as np  # Here: it takes a tenth of a second, and most commands never ask.

    if not isinstance(value, str):
        if not must:
            return value
        raise UserError(f"{path}: expected a dtype such as 'bfloat16', got {short_repr(value)}")
    if re.fullmatch(r'[\w.]+:[\w.]+', value):
        found = objects.resolve(value, path)
    else:
        try:
            name = np.dtype(value).name
        except (TypeError, ValueError):
            name = ''
        # Of other frameworks' names, numpy reads 'f16' as 16 bytes.
        is_ours = bool(name) and synonyms.DTYPES.get(value, name) == name
        found = _as_default_kind(default, name, value) if is_ours else None
    if found is value or is_dtype(found):
        return found
    if not must:
        return value
    raise UserError(f'{path}: {short_repr(value)} is not a dtype. {_hint(value)}')


def is_dtype(value: Any) -> bool:
    """Whether a value is a dtype, or a class that represents one, as `jnp.float32` does."""
    import numpy as np

    if value is inspect.Parameter.empty:
        return False
    if inspect.isclass(value) and issubclass(value, np.generic):
        return True
    of_class = inspect.isclass(value) and isinstance(getattr(value, 'dtype', None), np.dtype)
    return of_class or isinstance(value, np.dtype)


def _as_default_kind(default: Any, name: str, value: str) -> Any:
    """Returns JAX's class if the default is one, None if it has none; otherwise the text."""
    home = sys.modules.get('jax.numpy')
    if home is None or not any(each is default for each in vars(home).values()) or default is None:
        return value
    return getattr(home, name, None)


def _hint(value: str) -> str:
    import numpy as np

    home = sys.modules.get('jax.numpy', np)
    known = [n for n, each in vars(home).items() if len(n) >= _SHORTEST and is_dtype(each)]
    word = value.rpartition('.')[2]
    near = synonyms.DTYPES.get(word)
    if near is None and ':' not in value:  # A full name has led to something else.
        near = suggest.nearest_name(word, ['bfloat16', *known])
    return f'Did you mean {near!r}?' if near else "Write 'bfloat16', 'float16' or 'float32'."
