# SPDX-License-Identifier: Apache-2.0
"""Number types of a run: what parameters are kept in, and what a model computes in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """In which dtypes parameters are kept, the model computes, and the task reads its output.

    The model is called with its parameters and floating-point inputs cast to `compute`; modules
    that name no dtype of their own then compute in it. Other collections (batch statistics) are not
    cast: they are kept in float32.

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
