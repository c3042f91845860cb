# SPDX-License-Identifier: Apache-2.0
"""Prevents rows whose weights are all 0 from affecting anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from trainer.input.fields import MASK


@flax.struct.dataclass
class Weighing:
    """The results of a task's first run that are kept.

    Attributes:
        weights: weights as in a `TaskOutput`, never None.
        counted: the weights that decide whether a row counts.
        metrics: the metrics of the output, if all rows count in them; otherwise None.
    """

    weights: Any
    counted: tuple[jax.Array, ...]
    metrics: Any


def counted_rows(weights: Sequence[jax.Array]) -> jax.Array:
    """Returns which rows have a nonzero weight, bool (batch,)."""
    counts = [(x != 0).reshape(x.shape[0], -1).any(-1) for x in weights]
    return jnp.stack(counts).any(0)


def replace_uncounted_rows(fields: Mapping[str, Any], is_alive: jax.Array) -> dict[str, Any]:
    """Returns the batch with each row that does not count replaced by the first one that does.

    Not by zeros, because a model might divide by their norm. If no row counts, all become zeros.
    """
    rows = jnp.arange(is_alive.shape[0])
    # Not argmax, which would gather the whole array on every device.
    chosen = rows == jnp.where(is_alive, rows, len(rows)).min()

    def safe(x: Any) -> jax.Array:
        shape = (-1, *(1,) * (x.ndim - 1))
        # A masked sum instead of indexing, so that sharded rows stay on their devices.
        alone = jnp.where(chosen.reshape(shape), x, jnp.zeros((), x.dtype))
        row = alone.any(0) if x.dtype == bool else alone.sum(0, dtype=x.dtype)
        return jnp.where(is_alive.reshape(shape), x, row)

    return {name: x if name == MASK else safe(x) for name, x in fields.items()}


def compute_only_needed(function: Callable[[Any], Any], argument: Any) -> Any:
    """Returns `function(argument)` without the operations that its result does not need.

    The compiler would remove most of them too, but not effects (a print) or collectives, and they
    would count as operations. A loop or a compiled function is kept or removed as a whole.

    Args:
        function: returns a pytree of arrays; it may close over traced values.
        argument: a pytree of arrays.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(argument)
    needed = {id(x) for x in closed.jaxpr.outvars}
    equations = []
    for equation in reversed(closed.jaxpr.eqns):
        if any(id(x) in needed for x in equation.outvars):
            needed.update(id(x) for x in equation.invars)
            equations.append(equation)
    part = closed.replace(jaxpr=closed.jaxpr.replace(eqns=equations[::-1]))
    results = jaxpr_as_fun(part)(*jax.tree.leaves(argument))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)
