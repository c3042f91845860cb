# SPDX-License-Identifier: Apache-2.0
"""Converts array specifications of other libraries to `jax.ShapeDtypeStruct`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def as_spec(given: Any) -> Any:
    """Returns what has a shape and a dtype and is no array as a `jax.ShapeDtypeStruct`.

    Args:
        given: anything. The shape is a sequence of numbers, or a text such as '3 2'; the dtype is
            what numpy takes for one, or has it as `np_dtype`, as those of etils do.

    Raises:
        TypeError: for a shape or a dtype that leaves something open.
    """
    is_array = hasattr(given, '__array__') or hasattr(given, '__jax_array__')
    is_spec = isinstance(given, jax.ShapeDtypeStruct)
    if is_array or is_spec or not (hasattr(given, 'shape') and hasattr(given, 'dtype')):
        return given
    shape = given.shape.split() if isinstance(given.shape, str) else given.shape
    try:
        sizes = tuple(int(size) for size in shape)
        dtype = np.dtype(getattr(given.dtype, 'np_dtype', given.dtype))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f'init_bind: {given!r} has the shape {given.shape!r} and the dtype {given.dtype!r}; '
            'expected sizes that are numbers and one dtype, as in jax.ShapeDtypeStruct((3, 2), '
            "'float32')"
        ) from error
    return jax.ShapeDtypeStruct(sizes, jax.dtypes.canonicalize_dtype(dtype))
