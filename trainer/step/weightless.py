# SPDX-License-Identifier: Apache-2.0
"""Rows whose weights are all 0, and how they are kept from touching anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from trainer.step.fields import MASK


@flax.struct.dataclass
class Weighing:
    """What is used of a task's first run.

    Attributes:
        weights: as in a `TaskOutput`, set.
        counted: those by which a row counts or not.
        metrics: those of the output, where they count all rows; or else None.
    """

    weights: Any
    counted: tuple[jax.Array, ...]
    metrics: Any


def alive_rows(weights: Sequence[jax.Array]) -> jax.Array:
    """Returns which rows have a weight that is not 0, bool (batch,)."""
    counts = [(x != 0).reshape(x.shape[0], -1).any(-1) for x in weights]
    return jnp.stack(counts).any(0)


def with_living_rows(fields: Mapping[str, Any], is_alive: jax.Array) -> dict[str, Any]:
    """Returns the batch with the first row that counts in the place of those that do not.

    Not with zeros, by whose norm a model might divide; zeros only where no row counts.
    """
    rows = jnp.arange(is_alive.shape[0])
    # No argmax, for which every device would be sent all of it.
    chosen = rows == jnp.where(is_alive, rows, len(rows)).min()

    def safe(x: Any) -> jax.Array:
        shape = (-1, *(1,) * (x.ndim - 1))
        # A masked sum and no index: rows that are spread over devices stay where they are.
        alone = jnp.where(chosen.reshape(shape), x, jnp.zeros((), x.dtype))
        row = alone.any(0) if x.dtype == bool else alone.sum(0, dtype=x.dtype)
        return jnp.where(is_alive.reshape(shape), x, row)

    return {name: x if name == MASK else safe(x) for name, x in fields.items()}


def compute_only_needed(function: Callable[[Any], Any], argument: Any) -> Any:
    """Returns `function(argument)` without the operations that its result does not need.

    The compiler would drop them too, but for what has an effect (a print), collectives and counts
    of operations. Of a loop or a compiled function all or nothing is needed.

    Args:
        function: returns a pytree of arrays, and may use traced values from outside.
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
