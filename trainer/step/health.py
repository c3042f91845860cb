# SPDX-License-Identifier: Apache-2.0
"""Finds what is not finite inside the step, and keeps it from being trained on.

The flag is sticky and part of the state: from the first bad step on every update is a no-op. The
host reads it when it reads a row of metrics anyway, so no step waits for it. Checkpoints do not
hold it: no save commits while it is set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import optax

from trainer.parallel.host import fetch
from trainer.step.loss_scale import choose

if TYPE_CHECKING:
    from trainer.step.state import TrainState

# What was found first; labels outside their range are LABELS + the number of the check.
LOSS, GRADIENT, PARAMETER, SLOT, LABELS = 1, 2, 3, 4, 8

# Updates in a row that a loss scale may skip.
MOST_SKIPS = 50

# Where the signs of a batch travel among the metrics of a step.
SIGNS = '_signs'

# What a step must not change once it is stopped.
_FROZEN = ('params', 'opt_state', 'collections', 'ema', 'loss_scale')

# Elements up to which arrays share one kernel on an accelerator: see `norms`.
_SMALL = 2**17

# Elements up to which it is quicker to copy an array than to start a loop over it.
_TINY = 2**12


@flax.struct.dataclass
class Health:
    """Whether a run is sound, and if not, since when and why.

    Attributes:
        bad_step: int32 scalar, the first step (from 1) that was not sound; 0 for none.
        kind: int32 scalar, what was found there: LOSS, GRADIENT, PARAMETER, SLOT or LABELS + n.
        value: int32 scalar, the label that was found.
        skips: int32 scalar, updates in a row that the loss scale has skipped.
        known: float32 (leaves,), elements of each parameter and each leaf of the optimizer state
            that were not finite at the start (a mask of -inf): these do not count.
    """

    bad_step: jax.Array
    kind: jax.Array
    value: jax.Array
    skips: jax.Array
    known: jax.Array

    @classmethod
    def of(cls, params: Any, opt_state: Any) -> Health:
        """Returns the health of a state that training starts from."""
        known = [_count(x) for x in _floats((params, opt_state))]
        return cls(
            # Each in a buffer of its own: the state is donated.
            **{name: jnp.zeros((), jnp.int32) for name in ('bad_step', 'kind', 'value', 'skips')},
            known=jnp.stack(known) if known else jnp.zeros(0, jnp.float32),
        )

    @property
    def is_bad(self) -> jax.Array:
        """Whether updates have stopped: bool scalar."""
        return self.bad_step > 0

    def flagged(self, bad: jax.Array, kind: int | jax.Array, step: jax.Array) -> Health:
        """Returns the health after a check; what was found first stays.

        Args:
            bad: bool scalar, whether the check has found something.
            kind: what that is.
            step: number of the step, from 1.
        """
        first = bad & ~self.is_bad
        return dataclasses.replace(
            self,
            bad_step=jnp.where(first, step, self.bad_step),
            kind=jnp.where(first, kind, self.kind),
        )


@flax.struct.dataclass
class Signs(clu.metrics.Metric):
    """What a forward pass shows of a batch, merged over its slices like a metric.

    Attributes:
        losses: float32 scalar that is finite exactly if all losses and penalties are.
        label: int32 scalar, 1 + the number of the first check that failed; 0 for none.
        value: int32 scalar, the value that failed.
    """

    losses: jax.Array
    label: jax.Array
    value: jax.Array

    @classmethod
    def empty(cls) -> Signs:
        """Returns the signs of nothing."""
        zero = jnp.zeros((), jnp.int32)
        return cls(jnp.zeros((), jnp.float32), zero, zero)

    def merge(self, other: Signs) -> Signs:
        """Returns the signs of both."""
        mine = self.label > 0
        return Signs(
            # Never finite again: infinities of both signs give NaN.
            losses=self.losses + other.losses,
            label=jnp.where(mine, self.label, other.label),
            value=jnp.where(mine, self.value, other.value),
        )


def check_signs(state: TrainState, signs: Signs) -> Health:
    """Returns the health after a forward pass.

    Args:
        state: before the step.
        signs: of its batch.
    """
    assert state.health is not None
    health, bad, step = state.health, signs.label > 0, state.step + 1
    value = jnp.where(bad & ~health.is_bad, signs.value, health.value)
    health = dataclasses.replace(health, value=value)
    health = health.flagged(bad, LABELS + signs.label - 1, step)
    if copes(state.opt_state):
        return health
    return health.flagged(~jnp.isfinite(signs.losses), LOSS, step)


def check_gradients(state: TrainState, health: Health, finite: jax.Array) -> Health:
    """Returns the health after a backward pass.

    A loss scale finds its place by gradients that are not finite: these are skipped and counted,
    and bad only if the scale cannot get smaller, or after `MOST_SKIPS` in a row. An optimizer that
    has a rule of its own for them may use it.

    Args:
        state: before the update.
        health: after the forward pass.
        finite: bool scalar, whether all gradients are.
    """
    scale, step = state.loss_scale, state.step + 1
    if scale is None:
        return health if copes(state.opt_state) else health.flagged(~finite, GRADIENT, step)
    skips = jnp.where(finite, 0, health.skips + 1)
    hopeless = ~finite & (scale.is_smallest | (skips >= MOST_SKIPS))
    health = dataclasses.replace(health, skips=jnp.where(health.is_bad, health.skips, skips))
    return health.flagged(hopeless, GRADIENT, step)


def kept(health: Health | None) -> dict[str, Any]:
    """Returns what a checkpoint keeps in its metadata of a health that is not that of a new run.

    A member of an ensemble may have stopped, and a loss scale may be in the middle of its skips.
    """
    if health is None:
        return {}
    names = ('bad_step', 'kind', 'skips')
    values = dict(zip(names, fetch([getattr(health, name) for name in names]), strict=True))
    if not any(value.any() for value in values.values()):
        return {}
    return {'health': {name: value.tolist() for name, value in values.items()}}


def watch(before: TrainState, after: TrainState, signs: Signs) -> TrainState:
    """Returns the state after a step of the user's own, unless its forward pass was not sound.

    Args:
        before: the state before the step.
        after: the state after it.
        signs: of its forward pass.
    """
    assert after.health is not None
    early = check_signs(before, signs)
    return unless_bad(choose(early.is_bad, early, after.health), after, before)


def check_state(state: TrainState, *, whole: bool) -> Health:
    """Returns the health after an update: of the new parameters and the optimizer state.

    Args:
        state: after the update.
        whole: whether every device holds all of every parameter.
    """
    assert state.health is not None
    health = state.health
    params, slots = _floats(state.params), _floats(state.opt_state)
    known = health.known[: len(params)], health.known[len(params) :]

    def look() -> tuple[jax.Array, ...]:
        groups = zip((params, slots), known, strict=True)
        return tuple(_any_more(leaves, before, whole=whole) for leaves, before in groups)

    bad_params, bad_slots = _unless_clear([*params, *slots], (False, False), look)
    health = health.flagged(bad_params, PARAMETER, state.step)
    return health.flagged(bad_slots, SLOT, state.step)


def unless_bad(health: Health, new: TrainState, old: TrainState) -> TrainState:
    """Returns the new state, with the values of the old one where the run has stopped."""
    kept = {name: choose(health.is_bad, getattr(old, name), getattr(new, name)) for name in _FROZEN}
    return dataclasses.replace(new, health=health, **kept)


def copes(opt_state: Any) -> bool:
    """Whether an optimizer has a rule of its own for gradients that are not finite."""
    kind = optax.ApplyIfFiniteState
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return any(isinstance(node, kind) for node in nodes)


def all_finite(tree: Any, *, whole: bool = False) -> jax.Array:
    """Returns a bool scalar: whether all floats of a tree are finite.

    Args:
        tree: arrays.
        whole: whether every device holds all of every array.
    """
    leaves = _floats(tree)
    none = jnp.zeros(len(leaves), jnp.float32)
    (bad,) = _unless_clear(leaves, (False,), lambda: (_any_more(leaves, none, whole=whole),))
    return ~bad


def _unless_clear(
    leaves: Sequence[jax.Array], clear: tuple[bool, ...], look: Callable[[], tuple[jax.Array, ...]]
) -> tuple[jax.Array, ...]:
    """Returns what `look` finds; on a CPU it looks only if a quick test does not rule it out.

    There a sum of booleans costs several times a contraction, which XLA vectorises: a small
    model's step would be a tenth slower. An accelerator would wait for a branch.
    """
    if not leaves:
        return tuple(map(jnp.asarray, clear))
    if jax.default_backend() != 'cpu':
        return look()
    return jax.lax.cond(_is_clear(leaves), lambda: tuple(map(jnp.asarray, clear)), look)


def _is_clear(leaves: Sequence[jax.Array]) -> jax.Array:
    """Returns true only if all values are finite; false for very large ones, too."""
    by_shape: dict[Any, list[jax.Array]] = {}
    small = []
    for leaf in leaves:
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            if part.size <= _TINY:
                small.append(part.astype(jnp.float32).ravel())
            else:
                by_shape.setdefault((part.shape, part.dtype), []).append(part)
    if small:
        by_shape[()] = [jnp.concatenate(small)]
    total = jnp.float32(0)
    for same in by_shape.values():
        # Products of two arrays: whatever is not finite in either of them stays so.
        half = len(same) // 2
        pairs = [*zip(same[:half], same[half:], strict=False), *[(same[-1],) * 2] * (len(same) % 2)]
        for a, b in pairs:
            dims = tuple(range(a.ndim))
            total += jax.lax.dot_general(
                a, b, ((dims, dims), ((), ())), preferred_element_type=jnp.float32
            )
    return jnp.isfinite(total)


def _any_more(leaves: Sequence[jax.Array], known: jax.Array, *, whole: bool) -> jax.Array:
    """Returns whether more elements are not finite than are known.

    Small arrays share one kernel where no device holds only a part of one.
    """
    joined: list[int] = []
    alone: list[int] = []
    for index, leaf in enumerate(leaves):
        plain = leaf.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        (joined if whole and plain and leaf.size <= _SMALL else alone).append(index)
    groups = [[index] for index in alone] + ([joined] if joined else [])
    found = [jnp.zeros((), bool)]
    for group in groups:
        arrays = [leaves[index] for index in group]
        if len(arrays) > 1:
            arrays = [jnp.concatenate([x.astype(jnp.float32).ravel() for x in arrays])]
        found.append(_count(arrays[0]) > sum(known[index] for index in group))
    return jnp.stack(found).any()


def _count(x: jax.Array) -> jax.Array:
    # In float32: a very large array must not count around to 0.
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.float32)


def _floats(tree: Any) -> list[jax.Array]:
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, 'dtype')]
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]
