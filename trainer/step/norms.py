# SPDX-License-Identifier: Apache-2.0
"""The norms that a row shows: of the gradient, the parameters and the update."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Elements above which an array does not stay in a core's cache until the end of the step, and above
# which a kernel of an accelerator works longer than it takes to start.
_LARGE = 2**17


class _Leaf(NamedTuple):
    """One parameter in a step; what is frozen has no gradient and no update to tell of."""

    grad: jax.Array
    update: jax.Array
    old: jax.Array
    new: jax.Array
    frozen: bool
    whole: bool


def norms(
    *,
    grads: Any,
    updates: Any,
    old: Any,
    new: Any,
    frozen: Any,
    whole: Any = None,
    due: jax.Array | None,
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
    if whole is None:
        whole = jax.tree.map(lambda _: False, new)
    trees = (grads, updates, old, new, frozen, whole)
    leaves = [_Leaf(*x) for x in zip(*map(jax.tree.leaves, trees), strict=True)]
    if due is None:
        squares = _of_updates(_joined(leaves))
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
    flags = [leaf[4:] for leaf in leaves]

    def measured(arrays: list[tuple[jax.Array, ...]]) -> jax.Array:
        return measure([_Leaf._make([*x, *f]) for x, f in zip(arrays, flags, strict=True)])

    arrays = [leaf[:4] for leaf in leaves]
    return jax.lax.cond(due, measured, lambda _: jnp.zeros(3), arrays)


def _joined(leaves: list[_Leaf]) -> list[_Leaf]:
    """Makes one leaf of all small ones, which one kernel squares instead of one for each.

    Arrays that are cut over devices stay alone, or they would be gathered.
    """
    alone = [leaf for leaf in leaves if not leaf.whole or leaf.new.size > _LARGE]
    small = [leaf for leaf in leaves if leaf.whole and leaf.new.size <= _LARGE]
    for frozen in (False, True):
        if each := [leaf[:4] for leaf in small if leaf.frozen == frozen]:
            arrays = map(_concatenated, zip(*each, strict=True))
            alone.append(_Leaf._make([*arrays, frozen, True]))
    return alone


def _concatenated(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([x.astype(jnp.float32).ravel() for x in arrays])


def _of_updates(leaves: list[_Leaf]) -> jax.Array:
    """Returns the squares of gradient, parameters and update, float32 (3,)."""
    trained = [leaf for leaf in leaves if not leaf.frozen]
    return jnp.stack(
        [
            _squares([leaf.grad for leaf in trained]),
            _squares([leaf.new for leaf in leaves]),
            _squares([leaf.update for leaf in trained]),
        ]
    )


def _of_changes(leaves: list[_Leaf]) -> jax.Array:
    """Returns the same from what the update has changed."""
    return _of_updates([leaf._replace(update=leaf.new - leaf.old) for leaf in leaves])


def _squares(arrays: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, map(_square, arrays), jnp.float32(0))


def _square(x: jax.Array) -> jax.Array:
    # A contraction and not a sum of squares: the CPU backend does not vectorise sums.
    x = x.astype(jnp.float32)
    dims = tuple(range(x.ndim))
    return jax.lax.dot_general(x, x, ((dims, dims), ((), ())), precision=jax.lax.Precision.HIGHEST)
