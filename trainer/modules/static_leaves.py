# SPDX-License-Identifier: Apache-2.0
"""A pytree whose leaves that are not arrays are static."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=['arrays'], meta_fields=['rest', 'structure']
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class WithStaticLeaves:
    """A value with leaves of any type, of which JAX's transformations see only the arrays.

    Attributes:
        arrays: the leaves that are JAX types.
        rest: every other leaf, as (index among all leaves, leaf).
        structure: the pytree structure of the value.
    """

    # Linen collections may only hold pytrees of arrays, and modules sow and keep other values too.
    arrays: tuple[Any, ...]
    rest: tuple[tuple[int, Any], ...]
    structure: Any

    @classmethod
    def from_value(cls, value: Any) -> WithStaticLeaves:
        """Splits a value into arrays and other leaves."""
        leaves, structure = jax.tree.flatten(value)
        arrays = tuple(leaf for leaf in leaves if _has_type(leaf))
        rest = tuple((number, leaf) for number, leaf in enumerate(leaves) if not _has_type(leaf))
        return cls(arrays=arrays, rest=rest, structure=structure)

    @property
    def value(self) -> Any:
        """The value, with the arrays as transformations have changed them."""
        leaves = list(self.arrays)
        # In order of their indices, so that each insertion is at its final place.
        for number, leaf in self.rest:
            leaves.insert(number, leaf)
        return jax.tree.unflatten(self.structure, leaves)


def _has_type(leaf: Any) -> bool:
    # Not `isinstance(leaf, jax.Array)`: tracers, numpy arrays and numbers have a type too.
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True
