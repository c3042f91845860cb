# SPDX-License-Identifier: Apache-2.0
"""The dtypes of a run: parameters, computation and output."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainer import compat

# The name scope of a model's call if `compute` is set, and a pattern for it in name stacks such as
# 'transpose(jvp(model))/Dense_0'.
_SCOPE = 'model'
_IN_SCOPE = re.compile(rf'(?:^|[/(]){_SCOPE}(?:[/)]|$)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of a model's parameters, computation and output.

    The model is called with its parameters and floating-point inputs cast to `compute`; modules
    without an explicit dtype then compute in it. Other collections (batch statistics) are not
    cast: they stay in float32. Nothing is cast in the call that creates the parameters.

    Attributes:
        params: dtype of the parameters; the optimizer state of half-precision ones is float32.
        compute: dtype of the model's calls; None casts nothing.
        output: dtype of the model's output, which losses and metrics follow; None casts nothing.
    """

    params: Any = None
    compute: Any = None
    output: Any = None

    def cast_params(self, tree: Any) -> Any:
        """Casts the floating-point leaves to the dtype of parameters."""
        return _cast(tree, self.params)

    def cast_for_compute(self, tree: Any) -> Any:
        """Casts the floating-point leaves to the dtype of the computation."""
        return _cast(tree, self.compute)

    def model_scope(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the name scope for a call in another dtype, for `is_in_model_call`."""
        return jax.named_scope(_SCOPE)

    def restore_dtypes(self, updates: Any, before: Mapping[str, Any]) -> Any:
        """Casts the collections that a call has changed back to the dtypes that they had.

        Args:
            updates: the changed collections.
            before: all collections before the call.
        """
        if self.compute is None:
            return updates
        # A module may compute an update in half precision; the state must keep its dtypes.
        return {
            name: jax.tree.map(lambda new, old: new.astype(old.dtype), value, before[name])
            for name, value in updates.items()
        }

    def cast_output(self, tree: Any) -> Any:
        """Casts the floating-point leaves to the dtype of the output."""
        return _cast(tree, self.output)


AS_IS = Precision()


def is_in_model_call(equation: Any) -> bool:
    """Whether an equation of a jaxpr belongs to a model's call, or to its gradient.

    An equation in an inner jaxpr (the body of a loop) also does if the outer equation does.
    """
    return _IN_SCOPE.search(compat.name_stack(equation)) is not None


def accumulation_dtype(x: Any) -> Any:
    """Returns the dtype in which to sum values like these: float32 for half precision."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return jnp.float32 if narrow else x.dtype


def _cast(tree: Any, dtype: Any) -> Any:
    if dtype is None:
        return tree

    def cast(x: Any) -> Any:
        # Integers, flags, random keys and objects other than arrays are not cast.
        kind = getattr(x, 'dtype', None)
        return x.astype(dtype) if kind is not None and jnp.issubdtype(kind, jnp.floating) else x

    return jax.tree.map(cast, tree)
