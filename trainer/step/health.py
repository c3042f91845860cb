# SPDX-License-Identifier: Apache-2.0
"""Detects non-finite values inside the step, and stops updates from then on.

The flag is sticky and part of the state: from the first bad step on, updates change no parameter.
The host reads it after some of the steps, and no step waits for that. Checkpoints do not contain
it: nothing is saved while it is set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.modules.model_view import param_path
from trainer.parallel.host import fetch
from trainer.step.loss_scale import choose
from trainer.tasks.metrics import WeightedMean

if TYPE_CHECKING:
    from trainer.step.state import TrainState

# The kind of the first finding; a label out of range is LABELS + the index of its check.
LOSS, GRADIENT, PARAMETER, SLOT, LABELS = 1, 2, 3, 4, 8

# Updates in a row that a loss scale may skip.
MOST_SKIPS = 50

# The key of a batch's signs among the metrics of a step.
SIGNS = '_signs'

# Fields of a state that an update does not change once updates have stopped.
_FROZEN = ('params', 'collections', 'ema', 'loss_scale')

_BAD_STEP, _KIND, _VALUE, _SKIPS, _KNOWN = range(5)

# Elements up to which arrays share one kernel on an accelerator: see `norms`.
_SMALL = 2**17


@flax.struct.dataclass
class Health:
    """Whether a run is healthy, and if not, since when and why.

    Attributes:
        packed: int32 (4 + leaves,): the properties below, and for each parameter and each leaf of
            the optimizer state the number of elements that were not finite at the start (a mask of
            -inf), which are ignored. One array, because each one costs microseconds per step.
    """

    packed: jax.Array

    @classmethod
    def of(cls, params: Any, opt_state: Any) -> Health:
        """Returns the health of a state that training starts from, its elements counted."""
        tree = (params, opt_state)
        known = map(jnp.maximum, count_each(tree), _unsearched(tree))
        return cls(jnp.concatenate([jnp.zeros(_KNOWN, jnp.int32), jnp.array([*known], jnp.int32)]))

    @classmethod
    def clean(cls, params: Any, opt_state: Any) -> Health:
        """Returns the health of such a state if all of it is finite."""
        return cls(jnp.zeros(_KNOWN + len(floats((params, opt_state))), jnp.int32))

    @property
    def bad_step(self) -> jax.Array:
        """The first bad step (from 1); 0 for none: int32 (...)."""
        return self.packed[..., _BAD_STEP]

    @property
    def kind(self) -> jax.Array:
        """What was found there: LOSS, GRADIENT, PARAMETER, SLOT or LABELS + n: int32 (...)."""
        return self.packed[..., _KIND]

    @property
    def value(self) -> jax.Array:
        """The label that was found: float32 (...)."""
        return jax.lax.bitcast_convert_type(self.packed[..., _VALUE], jnp.float32)

    @property
    def skips(self) -> jax.Array:
        """Updates in a row that the loss scale has skipped: int32 (...)."""
        return self.packed[..., _SKIPS]

    @property
    def known(self) -> jax.Array:
        """Elements that were not finite at the start, of each leaf: int32 (..., leaves)."""
        return self.packed[..., _KNOWN:]

    @property
    def is_bad(self) -> jax.Array:
        """Whether updates have stopped: bool (...)."""
        return self.bad_step > 0

    def flagged(
        self, bad: jax.Array, kind: int | jax.Array, step: jax.Array, value: float | jax.Array = 0
    ) -> Health:
        """Returns the health after a check; the first finding is kept.

        Args:
            bad: bool scalar, whether the check has found something.
            kind: what that is.
            step: number of the step, from 1.
            value: of a label.
        """
        first = bad & ~self.is_bad
        bits = jax.lax.bitcast_convert_type(jnp.asarray(value, jnp.float32), jnp.int32)
        found = [jnp.asarray(x, jnp.int32) for x in (step, kind, bits)]
        if jax.device_count() == 1:
            # One number at a time: the compiler then sees what `is_bad` depends on, and updates do
            # not wait for the whole array. With several CPU devices they must: XLA runs collectives
            # that do not depend on each other in any order, and a device that starts with the other
            # one may block the rest forever.
            found = [jnp.where(first, x, self.packed[i]) for i, x in enumerate(found)]
            return Health(jnp.concatenate([jnp.stack(found), self.packed[_SKIPS:]]))
        packed = jnp.concatenate([jnp.stack(found), self.packed[_SKIPS:]])
        return Health(jnp.where(first, packed, self.packed))

    def skipping(self, skips: jax.Array) -> Health:
        """Returns the health with another number of skipped updates."""
        return Health(self.packed.at[_SKIPS].set(jnp.where(self.is_bad, self.skips, skips)))


def kept(health: Health | None) -> dict[str, Any]:
    """Returns the checkpoint metadata of a health that differs from that of a new run.

    A member of an ensemble may have stopped, and the loss scale may have skipped recent updates.
    """
    if health is None:
        return {}
    first = fetch(health.packed)[..., :_KNOWN]
    return {'health': first.tolist()} if first.any() else {}


def restored(health: Health, kept: Any) -> Health:
    """Returns the health of a restored state, given what `kept` returned when it was saved.

    Raises:
        ValueError: if that is of another shape.
    """
    if kept is None:
        return health
    packed = np.array(fetch(health.packed))
    first = packed[..., :_KNOWN]
    if np.shape(kept) != first.shape:
        raise ValueError(f'expected the shape {first.shape}, got {np.shape(kept)}')
    first[...] = kept
    return Health(jax.device_put(packed, health.packed.sharding))


@flax.struct.dataclass
class Signs(clu.metrics.Metric):
    """Findings of a forward pass, merged over the slices of a batch like a metric.

    Attributes:
        losses: float32 scalar that is finite exactly if all losses and penalties are.
        label: int32 scalar, 1 + the number of the first check that failed; 0 for none.
        value: float32 scalar, the value that failed.
    """

    losses: jax.Array
    label: jax.Array
    value: jax.Array

    @classmethod
    def empty(cls) -> Signs:
        """Returns the signs of nothing."""
        return cls(*(jnp.zeros((), kind) for kind in (jnp.float32, jnp.int32, jnp.float32)))

    def merge(self, other: Signs) -> Signs:
        """Returns the signs of both."""
        mine = self.label > 0
        return Signs(
            # Never becomes finite again: infinities of both signs give NaN.
            losses=self.losses + other.losses,
            label=jnp.where(mine, self.label, other.label),
            value=jnp.where(mine, self.value, other.value),
        )


def take_signs(metrics: Any) -> tuple[Any, list[Signs]]:
    """Returns metrics without the signs among them, at any depth, and these."""
    if not isinstance(metrics, Mapping):
        return metrics, []
    rest, found = {}, []
    for name, value in metrics.items():
        if name == SIGNS:
            found.append(value)
        else:
            rest[name], more = take_signs(value)
            found += more
    return rest, found


def signs_of(metrics: Any) -> Signs:
    """Returns the signs of a step that returns none, from its metrics named as losses."""
    leaves = jax.tree_util.tree_leaves_with_path(
        metrics, is_leaf=lambda node: isinstance(node, WeightedMean)
    )
    losses = [
        x.total
        for path, x in leaves
        if isinstance(x, WeightedMean) and param_path(path).endswith('loss')
    ]
    return dataclasses.replace(Signs.empty(), losses=sum(losses, jnp.float32(0)))


def check_signs(state: TrainState, signs: Signs) -> Health:
    """Returns the health after a forward pass.

    Args:
        state: before the step.
        signs: of its batch.
    """
    health = check_labels(state, signs)
    if copes(state.opt_state) or state.loss_scale is not None:
        return health  # The gradients of such a loss are not finite: see `check_gradients`.
    return health.flagged(~jnp.isfinite(signs.losses), LOSS, state.step + 1)


def check_labels(state: TrainState, signs: Signs) -> Health:
    """Returns the health after the labels of a forward pass were checked; as `check_signs`."""
    assert state.health is not None
    label = signs.label
    return state.health.flagged(label > 0, LABELS + label - 1, state.step + 1, signs.value)


def check_gradients(state: TrainState, health: Health, finite: jax.Array) -> Health:
    """Returns the health after a backward pass.

    A dynamic loss scale adapts by overflows: these are skipped and counted, and bad only if the
    scale cannot shrink any more, or after `MOST_SKIPS` in a row. An optimizer with its own rule for
    non-finite gradients applies that.

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
    return health.skipping(skips).flagged(hopeless, GRADIENT, step)


def check_state(state: TrainState, *, whole: bool = False) -> Health:
    """Returns the health after an update: of the new parameters and the optimizer state.

    Args:
        state: after the update.
        whole: whether every device holds all of every parameter.
    """
    assert state.health is not None
    params, slots = floats(state.params), floats(state.opt_state)
    known = state.health.known

    def look() -> tuple[jax.Array, jax.Array]:
        bad = _any_more(params, known[: len(params)], whole=whole)
        return bad, _any_more(slots, known[len(params) :], whole=whole)

    if jax.default_backend() == 'cpu':
        # A contraction rules it out most of the time, several times faster and without a copy.
        none = jnp.zeros((), bool)
        bad_params, bad_slots = jax.lax.cond(
            _is_clear([*params, *slots]), lambda: (none, none), look
        )
    else:
        bad_params, bad_slots = look()
    health = state.health.flagged(bad_params, PARAMETER, state.step)
    return health.flagged(bad_slots, SLOT, state.step)


def unless_bad(
    health: Health, new: TrainState, old: TrainState, *, slots: bool = True
) -> TrainState:
    """Returns the new state, with the values of the old one where updates have stopped.

    Args:
        health: of the new state.
        new: the state after an update.
        old: the state before it.
        slots: whether that includes the optimizer state.
    """
    fields = (*_FROZEN, 'opt_state') if slots else _FROZEN
    return dataclasses.replace(new.keeping(health.is_bad, old, fields), health=health)


def watch(before: TrainState, after: TrainState, signs: Signs, *, slots: bool = True) -> TrainState:
    """Returns the state after a custom step, or the old one if its forward pass was bad.

    Args:
        before: the state before the step.
        after: the state after it.
        signs: of its forward pass.
        slots: as in `unless_bad`.
    """
    assert after.health is not None
    early = check_signs(before, signs)
    health = choose(early.is_bad, early, after.health)
    # However many updates the function makes, this is one step.
    step = jnp.where(health.is_bad & ~early.is_bad, before.step + 1, health.bad_step)
    health = Health(health.packed.at[_BAD_STEP].set(step))
    return unless_bad(health, after, before, slots=slots)


def copes(opt_state: Any) -> bool:
    """Whether an optimizer has a rule of its own for gradients that are not finite."""
    kinds = (optax.ApplyIfFiniteState, optax.ZeroNansState, optax.MultiStepsState)
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    for node in nodes:
        if isinstance(node, optax.MultiStepsState):
            # It may skip them, too; or what it wraps has a rule.
            if jax.tree.leaves(node.skip_state) or copes(node.inner_opt_state):
                return True
        elif isinstance(node, kinds):
            return True
    return False


def all_finite(tree: Any, *, whole: bool = False) -> jax.Array:
    """Returns a bool scalar: whether all floats of a tree are finite.

    Args:
        tree: arrays.
        whole: whether every device holds all of every array.
    """
    leaves = floats(tree)
    return ~_any_more(leaves, jnp.zeros(len(leaves), jnp.int32), whole=whole)


def _is_clear(leaves: Sequence[jax.Array]) -> jax.Array:
    """Returns true only if all elements are finite; false for very large ones, too."""
    total = jnp.float32(0)
    for leaf in leaves:
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            dims = tuple(range(part.ndim))
            total += jax.lax.dot_general(
                part, part, ((dims, dims), ((), ())), preferred_element_type=jnp.float32
            )
    return jnp.isfinite(total)


def _any_more(leaves: Sequence[jax.Array], known: jax.Array, *, whole: bool) -> jax.Array:
    """Returns whether more elements are not finite than at the start.

    Small arrays share one kernel if none of them is sharded.
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
    """Returns the number of elements that are not finite, int32, at most 2^30."""
    # Counted in float32: for a very large array, an integer count could wrap around to 0.
    count = jnp.sum(~jnp.isfinite(x), dtype=jnp.float32)
    return jnp.minimum(count, 2.0**30).astype(jnp.int32)


def count_each(tree: Any) -> list[jax.Array]:
    """Returns for each float leaf of a tree the number of elements that are not finite."""
    return [_count(x) for x in floats(tree)]


def floats(tree: Any) -> list[jax.Array]:
    """Returns the leaves that can be non-finite."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, 'dtype')]
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]


def _unsearched(tree: Any) -> list[int]:
    """Returns 1 for each float leaf that is a number of a line search, which may find none."""
    kinds = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)

    def mark(node: Any) -> Any:
        if isinstance(node, kinds):
            return jax.tree.map(lambda x: int(not x.shape), node)
        return 0

    marks = jax.tree.map(mark, tree, is_leaf=lambda node: isinstance(node, kinds))
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(marks), strict=True)
    return [number for x, number in pairs if floats(x)]
