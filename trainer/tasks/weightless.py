# SPDX-License-Identifier: Apache-2.0
"""Prevents examples whose weights are all 0 from affecting the others, whatever their values."""

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
        counted: the weights that decide whether an example counts.
        metrics: the metrics of the output, if all examples count in them; otherwise None.
    """

    weights: Any
    counted: tuple[jax.Array, ...]
    metrics: Any


def counted_examples(weights: Sequence[jax.Array]) -> jax.Array:
    """Returns which examples have a nonzero weight, bool (batch,)."""
    counts = [(x != 0).reshape(x.shape[0], -1).any(-1) for x in weights]
    return jnp.stack(counts).any(0)


def replace_uncounted_examples(fields: Mapping[str, Any], counts: jax.Array) -> dict[str, Any]:
    """Returns the batch with each example that does not count replaced by the first that does.

    Not by zeros, because a model might divide by their norm. If none counts, all become zeros.

    Args:
        fields: arrays (batch, ...).
        counts: bool (batch,), whether an example counts.
    """
    indices = jnp.arange(counts.shape[0])
    # Not argmax, which would gather the whole array on every device.
    is_first = indices == jnp.where(counts, indices, len(indices)).min()

    def replace(x: Any) -> jax.Array:
        shape = (-1, *(1,) * (x.ndim - 1))
        # A masked sum instead of indexing, so that sharded examples stay on their devices.
        masked = jnp.where(is_first.reshape(shape), x, jnp.zeros((), x.dtype))
        first = masked.any(0) if x.dtype == bool else masked.sum(0, dtype=x.dtype)
        return jnp.where(counts.reshape(shape), x, first)

    # The mask keeps its values: they mark padding.
    return {name: x if name == MASK else replace(x) for name, x in fields.items()}


def compute_only_needed(function: Callable[[Any], Any], argument: Any) -> Any:
    """Returns `function(argument)` without the operations that its result does not need.

    The compiler would remove most of them, but not effects (a print) or collectives, and they would
    count in the FLOPs of a step. A loop or a compiled function is kept or removed as a whole.

    Args:
        function: returns a pytree of arrays; it may close over traced values.
        argument: a pytree of arrays.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(argument)
    # Backward from the results: an equation is kept if something that is needed comes from it.
    needed = {id(x) for x in closed.jaxpr.outvars}
    equations = []
    for equation in reversed(closed.jaxpr.eqns):
        if any(id(x) in needed for x in equation.outvars):
            needed.update(id(x) for x in equation.invars)
            equations.append(equation)
    part = closed.replace(jaxpr=closed.jaxpr.replace(eqns=equations[::-1]))
    results = jaxpr_as_fun(part)(*jax.tree.leaves(argument))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)
