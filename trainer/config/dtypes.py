# SPDX-License-Identifier: Apache-2.0
"""Resolves dtypes that a config gives by name, as in `dtype='bfloat16'`."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from trainer.config import objects, suggest, synonyms
from trainer.config.errors import UserError, short_repr

# Shorter names, such as NumPy's 'f4', are similar to anything and so are not suggested.
_MIN_CHARACTERS = 3


def from_name(value: Any, default: Any, path: str, *, must: bool) -> Any:
    """Returns the dtype with a name, as the same type of object as the default.

    Args:
        value: the value in the config, such as 'bfloat16'.
        default: default of the argument.
        path: key path of the value, for messages.
        must: whether the argument must be a dtype; otherwise any other value is returned unchanged.

    Raises:
        UserError: if the argument must be a dtype, and there is none with that name.
    """
    import numpy as np  # Importing takes 0.1 s, and most commands do not need it.

    if not isinstance(value, str):
        if not must:
            return value
        raise UserError(f"{path}: expected a dtype such as 'bfloat16', got {short_repr(value)}")
    if re.fullmatch(r'[\w.]+:[\w.]+', value):
        dtype = objects.resolve(value, path)
    else:
        try:
            name = np.dtype(value).name
        except (TypeError, ValueError):
            name = ''
        # Other frameworks' names must not pass: NumPy reads 'f16' as a float of 16 bytes.
        is_valid = bool(name) and synonyms.DTYPES.get(value, name) == name
        dtype = _as_default_kind(default, name, value) if is_valid else None
    if dtype is value or is_dtype(dtype):
        return dtype
    if not must:
        return value
    raise UserError(f'{path}: {short_repr(value)} is not a dtype. {_hint(value)}')


def is_dtype(value: Any) -> bool:
    """Whether a value is a dtype, or a class that represents one, such as `jnp.float32`."""
    import numpy as np

    if value is inspect.Parameter.empty:
        return False
    if inspect.isclass(value) and issubclass(value, np.generic):
        return True
    # JAX's classes do not inherit from NumPy's types.
    is_class = inspect.isclass(value) and isinstance(getattr(value, 'dtype', None), np.dtype)
    return is_class or isinstance(value, np.dtype)


def _as_default_kind(default: Any, name: str, value: str) -> Any:
    """Returns JAX's class of that name if the default is such a class, and the text otherwise.

    Code with a default of `jnp.float32` may call it (`dtype(0)`), which a text would break. None if
    JAX has no such class.
    """
    jax_numpy = sys.modules.get('jax.numpy')
    if jax_numpy is None or default is None:
        return value
    if not any(each is default for each in vars(jax_numpy).values()):
        return value
    return getattr(jax_numpy, name, None)


def _hint(value: str) -> str:
    import numpy as np

    module = sys.modules.get('jax.numpy', np)
    names = [
        name
        for name, each in vars(module).items()
        if len(name) >= _MIN_CHARACTERS and is_dtype(each)
    ]
    word = value.rpartition('.')[2]
    nearest = synonyms.DTYPES.get(word)
    # 'package.module:name' exists but is not a dtype; a similar name would be a coincidence.
    if nearest is None and ':' not in value:
        nearest = suggest.nearest_name(word, ['bfloat16', *names])
    return f'Did you mean {nearest!r}?' if nearest else "Write 'bfloat16', 'float16' or 'float32'."
