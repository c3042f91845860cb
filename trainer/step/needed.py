# SPDX-License-Identifier: Apache-2.0
"""Calls of functions of whose work only a part is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun


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
