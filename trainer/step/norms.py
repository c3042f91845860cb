# SPDX-License-Identifier: Apache-2.0
"""The norms that a row shows: of the gradient, the parameters and the update."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Elements above which an array does not stay in a core's cache until the end of the step, and above
# which a kernel of a GPU works longer than it takes to start.
_LARGE = 2**17


class _Leaf(NamedTuple):
    """One parameter in a step; what is frozen has no gradient and no update to tell of."""

    grad: jax.Array
    update: jax.Array
    old: jax.Array
    new: jax.Array
    frozen: bool


def norms(
    *,
    grads: Any,
    updates: Any,
    old: Any,
    new: Any,
    frozen: Any,
    due: jax.Array | None,
    whole: Any = None,
) -> dict[str, jax.Array]:
    """Returns the float32 norms 'grad', 'param' and 'update' of one step.

    Args:
        grads: of all parameters.
        updates: what was added to them.
        old: the parameters before.
        new: the parameters after.
        frozen: for each parameter whether it is left out of 'grad' and 'update'.
        due: whether anyone will look at this step's; else they are 0, and cost next to nothing.
            None: always.
        whole: for each parameter whether no device holds only a part of it; None: unknown.
    """
    trees = (grads, updates, old, new, frozen)
    leaves = [_Leaf(*x) for x in zip(*map(jax.tree.leaves, trees), strict=True)]
    if due is None:
        held = [False] * len(leaves) if whole is None else jax.tree.leaves(whole)
        groups: dict[bool, list[_Leaf]] = {True: [], False: []}
        for leaf, all_of_it in zip(leaves, held, strict=True):
            groups[all_of_it and leaf.new.size <= _LARGE].append(leaf)
        # Arrays that are cut over devices stay alone, or they would be gathered.
        squares = _of_updates(groups[True], _squares_at_once) + _of_updates(groups[False])
    else:
        # What a branch reads has to be kept for it. So a large array has a branch of its own, right
        # where it is at hand; small ones share one, for each branch costs some microseconds.
        large = [leaf for leaf in leaves if leaf.new.size > _LARGE]
        small = [leaf for leaf in leaves if leaf.new.size <= _LARGE]
        squares = _if_due(due, _of_updates, small)
        for leaf in large:
            # The update itself would be written to memory only for this.
            exact = leaf.new.dtype == jnp.float32
            squares += _if_due(due, _of_changes if exact else _of_updates, [leaf])
    return dict(zip(('grad', 'param', 'update'), jnp.sqrt(squares), strict=True))


def _if_due(due: jax.Array, measure: Any, leaves: list[_Leaf]) -> jax.Array:
    frozen = [leaf.frozen for leaf in leaves]

    def measured(arrays: list[tuple[jax.Array, ...]]) -> jax.Array:
        return measure([_Leaf._make([*x, f]) for x, f in zip(arrays, frozen, strict=True)])

    arrays = [tuple(leaf)[:-1] for leaf in leaves]
    return jax.lax.cond(due, measured, lambda _: jnp.zeros(3), arrays)


def _squares(arrays: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, map(_square, arrays), jnp.float32(0))


def _squares_at_once(arrays: list[jax.Array]) -> jax.Array:
    """Returns the same with one kernel instead of one for each."""
    return _square(_concatenated(arrays)) if arrays else jnp.float32(0)


def _concatenated(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([x.astype(jnp.float32).ravel() for each in arrays for x in _real(each)])


def _real(x: jax.Array) -> tuple[jax.Array, ...]:
    """Returns real arrays with the same sum of squares: both parts of a complex array."""
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def _of_updates(leaves: list[_Leaf], squares_of: Any = _squares) -> jax.Array:
    """Returns the squares of gradient, parameters and update, float32 (3,)."""
    trained = [leaf for leaf in leaves if not leaf.frozen]
    return jnp.stack(
        [
            squares_of([leaf.grad for leaf in trained]),
            squares_of([leaf.new for leaf in leaves]),
            squares_of([leaf.update for leaf in trained]),
        ]
    )


def _of_changes(leaves: list[_Leaf]) -> jax.Array:
    """Returns the same from what the update has changed."""
    return _of_updates([leaf._replace(update=leaf.new - leaf.old) for leaf in leaves])


def _square(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return _square(x.real) + _square(x.imag)
    # A contraction and not a sum of squares: the CPU backend does not vectorise sums.
    x = x.astype(jnp.float32)
    dims = tuple(range(x.ndim))
    return jax.lax.dot_general(x, x, ((dims, dims), ((), ())), precision=jax.lax.Precision.HIGHEST)
