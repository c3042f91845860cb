# SPDX-License-Identifier: Apache-2.0
"""The moving average of the parameters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from trainer.modules.precision import accumulation_dtype


def init(params: Any) -> Any:
    """Returns the average of one set of parameters: a copy, float32 for half-precision ones.

    A copy, because two leaves of a donated state must not share a buffer.
    """
    return jax.tree.map(_copy, params)


def update(average: Any, params: Any, decay: float) -> Any:
    """Returns the average after one more update."""
    return jax.tree.map(functools.partial(_move, share=1.0 - decay), average, params)


def _copy(param: jax.Array) -> jax.Array:
    # In half precision, small changes of the average would be rounded away. `jnp.array` copies even
    # if the dtype stays the same, where `astype` might return the parameter itself.
    return jnp.array(param, accumulation_dtype(param))


def _move(mean: jax.Array, param: jax.Array, share: float) -> jax.Array:
    # In this form, the average of a frozen parameter stays bitwise equal to the parameter.
    return mean + share * (_copy(param) - mean)
