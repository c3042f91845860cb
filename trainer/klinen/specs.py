# SPDX-License-Identifier: Apache-2.0
"""Converts array specifications of other libraries to `jax.ShapeDtypeStruct`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def as_spec(value: Any) -> Any:
    """Converts an object with a shape and a dtype to a `jax.ShapeDtypeStruct`.

    Arrays and all other values are returned unchanged.

    Args:
        value: anything. A shape is a sequence of numbers or a string such as '3 2'; a dtype is one
            of numpy, or has one as `np_dtype`, as those of etils do.

    Raises:
        TypeError: for a shape or a dtype that is not fully specified.
    """
    is_array = hasattr(value, '__array__') or hasattr(value, '__jax_array__')
    is_spec = isinstance(value, jax.ShapeDtypeStruct)
    if is_array or is_spec or not (hasattr(value, 'shape') and hasattr(value, 'dtype')):
        return value
    # The specs of etils have their shape as a string.
    shape = value.shape.split() if isinstance(value.shape, str) else value.shape
    try:
        sizes = tuple(int(size) for size in shape)
        dtype = np.dtype(getattr(value.dtype, 'np_dtype', value.dtype))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f'init_bind: {value!r} has the shape {value.shape!r} and the dtype {value.dtype!r}; '
            'expected integer sizes and a single dtype, as in jax.ShapeDtypeStruct((3, 2), '
            "'float32')"
        ) from error
    # Without 64-bit mode, a float64 spec becomes float32, like an actual array.
    return jax.ShapeDtypeStruct(sizes, jax.dtypes.canonicalize_dtype(dtype))
