# SPDX-License-Identifier: Apache-2.0
"""Checks arrays for non-finite elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Arrays of up to this many elements share one kernel on an accelerator: see `step_metrics`.
_SMALL = 2**17


def all_finite(tree: Any, *, replicated: bool = False) -> jax.Array:
    """Returns whether all floats of a tree are finite: bool scalar.

    Args:
        tree: pytree of arrays.
        replicated: whether every device has all of every array.
    """
    leaves = floats(tree)
    return ~has_new_non_finite(leaves, jnp.zeros(len(leaves), jnp.int32), replicated=replicated)


def is_surely_finite(leaves: Sequence[jax.Array]) -> jax.Array:
    """Returns true only if all elements are finite; false also for very large ones.

    The sum of squares is finite only if every element is, and a contraction is fast on CPUs.
    """
    total = jnp.float32(0)
    for leaf in leaves:
        # Complex numbers as two real parts, because squares of complex numbers can cancel.
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            dims = tuple(range(part.ndim))
            total += jax.lax.dot_general(
                part, part, ((dims, dims), ((), ())), preferred_element_type=jnp.float32
            )
    return jnp.isfinite(total)


def has_new_non_finite(
    leaves: Sequence[jax.Array], known: jax.Array, *, replicated: bool
) -> jax.Array:
    """Returns whether more elements are non-finite than at the start: bool scalar.

    Small arrays are concatenated and share one kernel, if none of them is sharded: on an
    accelerator, launching a kernel takes longer than checking a small array.

    Args:
        leaves: floating-point or complex arrays.
        known: int32 (leaves,), the number of elements of each that were non-finite at the start.
        replicated: whether every device has all of every array.
    """
    joined: list[int] = []
    alone: list[int] = []
    for index, leaf in enumerate(leaves):
        # Those that float32 can represent; concatenating others would change their values.
        is_plain = leaf.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        (joined if replicated and is_plain and leaf.size <= _SMALL else alone).append(index)
    groups = [[index] for index in alone] + ([joined] if joined else [])
    flags = [jnp.zeros((), bool)]
    for group in groups:
        arrays = [leaves[index] for index in group]
        if len(arrays) > 1:
            arrays = [jnp.concatenate([x.astype(jnp.float32).ravel() for x in arrays])]
        flags.append(_count(arrays[0]) > sum(known[index] for index in group))
    return jnp.stack(flags).any()


def _count(x: jax.Array) -> jax.Array:
    """Returns the number of non-finite elements, int32, at most 2^30."""
    # Counted in float32, because an int32 count of a very large array could wrap around to 0.
    count = jnp.sum(~jnp.isfinite(x), dtype=jnp.float32)
    return jnp.minimum(count, 2.0**30).astype(jnp.int32)


def count_non_finite(tree: Any) -> list[jax.Array]:
    """Returns the number of non-finite elements of each float leaf of a tree."""
    return [_count(x) for x in floats(tree)]


def floats(tree: Any) -> list[jax.Array]:
    """Returns the floating-point and complex leaves, which can be non-finite."""
    # Python numbers have no dtype, and that of random keys is not inexact.
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, 'dtype')]
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]
