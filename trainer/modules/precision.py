# SPDX-License-Identifier: Apache-2.0
"""Number types of a run: what parameters are kept in, and what a model computes in."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# The scope of what a model computes whose dtype is asked for, and how it shows in a name stack:
# 'transpose(jvp(model))/Dense_0'.
_SCOPE = 'model'
_IN_SCOPE = re.compile(rf'(?:^|[/(]){_SCOPE}(?:[/)]|$)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """In which dtypes parameters are kept, the model computes, and the task reads its output.

    The model is called with its parameters and floating-point inputs cast to `compute`; modules
    that name no dtype of their own then compute in it. Other collections (batch statistics) are not
    cast: they are kept in float32. Nothing is cast in the call that makes the parameters.

    Attributes:
        params: of the parameters; what an optimizer keeps for halves is float32.
        compute: of the model's calls; None casts nothing.
        output: of what the model returns; losses and metrics follow it. None casts nothing.
    """

    params: Any = None
    compute: Any = None
    output: Any = None

    def for_params(self, tree: Any) -> Any:
        """Returns the floating-point leaves in the dtype that parameters are kept in."""
        return _cast(tree, self.params)

    def for_compute(self, tree: Any) -> Any:
        """Returns the floating-point leaves in the dtype that the model computes in."""
        return _cast(tree, self.compute)

    def calling(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context of a call of the model: `in_call` knows what is traced in it."""
        return contextlib.nullcontext() if self.compute is None else jax.named_scope(_SCOPE)

    def like(self, updates: Any, before: Mapping[str, Any]) -> Any:
        """Returns collections that a call has changed, in the dtypes that they had."""
        if self.compute is None:
            return updates
        return {
            name: jax.tree.map(lambda new, old: new.astype(old.dtype), value, before[name])
            for name, value in updates.items()
        }

    def for_output(self, tree: Any) -> Any:
        """Returns the floating-point leaves in the dtype that the task reads."""
        return _cast(tree, self.output)


AS_IS = Precision()


def in_call(equation: Any) -> bool:
    """Whether an equation of a jaxpr is of a model's call, or of the gradient through one.

    One in a jaxpr within another (the body of a loop) is so too if the equation around it is.
    """
    return _IN_SCOPE.search(str(equation.source_info.name_stack)) is not None


def at_least_float32(x: Any) -> Any:
    """Returns the dtype in which values like these are summed up: float32 for halves."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return jnp.float32 if narrow else x.dtype


def _cast(tree: Any, dtype: Any) -> Any:
    if dtype is None:
        return tree

    def cast(x: Any) -> Any:
        # An object that is no array (a flag, a None, a key) goes through as it is.
        kind = getattr(x, 'dtype', None)
        return x.astype(dtype) if kind is not None and jnp.issubdtype(kind, jnp.floating) else x

    return jax.tree.map(cast, tree)
