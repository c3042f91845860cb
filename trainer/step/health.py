# SPDX-License-Identifier: Apache-2.0
"""Detects non-finite values inside the step, and stops updates from then on.

The flag is part of the state, and it is sticky: from the first bad step on, updates change no
parameter. So no step has to wait for the host, which reads the flag from time to time. Checkpoints
do not contain it, because nothing is saved while it is set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.modules.model_view import param_path
from trainer.parallel.host import fetch
from trainer.step.finite import count_non_finite, floats, has_new_non_finite, is_surely_finite
from trainer.step.loss_scale import LossScale
from trainer.tasks.metrics import WeightedMean

# The kinds of findings; a label out of range is LABELS + the index of its check.
LOSS, GRADIENT, PARAMETER, SLOT, LABELS = 1, 2, 3, 4, 8

# Maximum number of consecutive updates that a loss scale may skip.
MOST_SKIPS = 50

# The key of a batch's findings among the metrics of a step.
FINDINGS = '_signs'

# The fields of a state that keep their values once updates have stopped. On CPUs the optimizer
# state is left out, because it would be copied in each step.
UPDATED = ('params', 'collections', 'ema', 'loss_scale', 'opt_state')

# Indices into `Health.packed`; the counts of known elements start at the last one.
_BAD_STEP, _KIND, _VALUE, _SKIPS, _KNOWN = range(5)


@flax.struct.dataclass
class Health:
    """Whether a run is healthy, and if not, since which step and why.

    Attributes:
        packed: int32 (4 + leaves,): the properties below, and for each parameter and each leaf of
            the optimizer state the number of elements that were non-finite at the start (such as a
            mask of -inf), which are ignored. All in one array, because each array of a state costs
            microseconds per step.
    """

    packed: jax.Array

    @classmethod
    def from_arrays(cls, params: Any, opt_state: Any) -> Health:
        """Returns the health of a state that training starts from; counts non-finite elements."""
        tree = (params, opt_state)
        # A line search may have a non-finite scalar later than at the start, so it always has a
        # count of at least 1.
        known = map(jnp.maximum, count_non_finite(tree), _mark_line_search(tree))
        return cls(jnp.concatenate([jnp.zeros(_KNOWN, jnp.int32), jnp.array([*known], jnp.int32)]))

    @classmethod
    def from_finite(cls, params: Any, opt_state: Any) -> Health:
        """Returns the health of a state whose elements are all finite."""
        return cls(jnp.zeros(_KNOWN + len(floats((params, opt_state))), jnp.int32))

    @property
    def bad_step(self) -> jax.Array:
        """The first bad step (from 1); 0 for none: int32 (...)."""
        return self.packed[..., _BAD_STEP]

    @property
    def kind(self) -> jax.Array:
        """The kind of the finding: LOSS, GRADIENT, PARAMETER, SLOT or LABELS + n: int32 (...)."""
        return self.packed[..., _KIND]

    @property
    def value(self) -> jax.Array:
        """The label that is out of range: float32 (...)."""
        # Its bits are in the int32 array: a conversion would lose soft labels such as 1.5.
        return jax.lax.bitcast_convert_type(self.packed[..., _VALUE], jnp.float32)

    @property
    def skips(self) -> jax.Array:
        """Consecutive updates that the loss scale has skipped: int32 (...)."""
        return self.packed[..., _SKIPS]

    @property
    def known(self) -> jax.Array:
        """Elements of each leaf that were non-finite at the start: int32 (..., leaves)."""
        return self.packed[..., _KNOWN:]

    @property
    def is_bad(self) -> jax.Array:
        """Whether updates have stopped: bool (...)."""
        return self.packed[..., _BAD_STEP] > 0

    def with_flag(
        self, bad: jax.Array, kind: int | jax.Array, step: jax.Array, value: float | jax.Array = 0
    ) -> Health:
        """Returns the health after a check; only the first finding is kept.

        Args:
            bad: bool scalar, whether the check has failed.
            kind: kind of the finding.
            step: number of the step, from 1.
            value: the label, if the kind is LABELS + n.
        """
        first = bad & ~self.is_bad
        bits = jax.lax.bitcast_convert_type(jnp.asarray(value, jnp.float32), jnp.int32)
        finding = [jnp.asarray(x, jnp.int32) for x in (step, kind, bits)]
        if jax.device_count() == 1:
            # Element by element, for speed only: the compiler sees what `is_bad` depends on, and
            # updates need not wait for the whole array. CPU time of a step of the MLP
            # (`tests/benchmarks/beside.py OTHER mlp`, 9 pairs, jax 0.10.2): 0.85 [0.67, 0.99] of
            # that with one array. With several CPU devices they must wait: XLA runs independent
            # collectives in any order, and devices that start with different ones would deadlock.
            finding = [jnp.where(first, x, self.packed[i]) for i, x in enumerate(finding)]
            return Health(jnp.concatenate([jnp.stack(finding), self.packed[_SKIPS:]]))
        packed = jnp.concatenate([jnp.stack(finding), self.packed[_SKIPS:]])
        return Health(jnp.where(first, packed, self.packed))

    def with_bad_step(self, step: jax.Array) -> Health:
        """Returns the health with another step as the first bad one."""
        return Health(self.packed.at[_BAD_STEP].set(step))

    def with_skips(self, skips: jax.Array) -> Health:
        """Returns the health with another number of skipped updates."""
        # Not once updates have stopped: the number at that point explains why.
        return Health(self.packed.at[_SKIPS].set(jnp.where(self.is_bad, self.skips, skips)))


def to_metadata(health: Health | None) -> dict[str, Any]:
    """Returns the health as checkpoint metadata; empty if it equals that of a new run.

    It differs if a member of an ensemble has stopped, or the loss scale has just skipped updates.
    """
    if health is None:
        return {}
    first = fetch(health.packed)[..., :_KNOWN]
    return {'health': first.tolist()} if first.any() else {}


def from_metadata(health: Health, kept: Any) -> Health:
    """Returns the health of a restored state from its metadata: see `to_metadata`.

    Raises:
        ValueError: if the metadata has another shape.
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
class Findings(clu.metrics.Metric):
    """Findings of a forward pass, merged over the micro-batches of a batch like a metric.

    Attributes:
        losses: float32 scalar that is finite if and only if all losses and penalties are.
        label: int32 scalar, 1 + the number of the first check that failed; 0 for none.
        value: float32 scalar, the value that failed.
    """

    losses: jax.Array
    label: jax.Array
    value: jax.Array

    @classmethod
    def empty(cls) -> Findings:
        """Returns the findings of a pass in which nothing was wrong."""
        return cls(*(jnp.zeros((), kind) for kind in (jnp.float32, jnp.int32, jnp.float32)))

    def merge(self, other: Findings) -> Findings:
        """Returns the merged findings; the first bad label is kept."""
        has_label = self.label > 0
        return Findings(
            # A sum stays non-finite: inf - inf is NaN.
            losses=self.losses + other.losses,
            label=jnp.where(has_label, self.label, other.label),
            value=jnp.where(has_label, self.value, other.value),
        )


def take_findings(metrics: Any) -> tuple[Any, list[Findings]]:
    """Returns the metrics without the findings in them, at any depth, and the list of findings."""
    if not isinstance(metrics, Mapping):
        return metrics, []
    rest, findings = {}, []
    for name, value in metrics.items():
        if name == FINDINGS:
            findings.append(value)
        else:
            rest[name], more = take_findings(value)
            findings += more
    return rest, findings


def findings_from_metrics(metrics: Any) -> Findings:
    """Returns findings from the metrics of a step whose names end in 'loss'."""
    leaves = jax.tree_util.tree_leaves_with_path(
        metrics, is_leaf=lambda node: isinstance(node, WeightedMean)
    )
    # The sum, because the mean of a batch of weight 0 is NaN, which is not a failure.
    losses = [
        x.total
        for path, x in leaves
        if isinstance(x, WeightedMean) and param_path(path).endswith('loss')
    ]
    return dataclasses.replace(Findings.empty(), losses=sum(losses, jnp.float32(0)))


def check_gradients(
    health: Health,
    finite: jax.Array,
    step: jax.Array,
    scale: LossScale | None,
    *,
    excused: bool,
) -> Health:
    """Returns the health after a backward pass.

    A dynamic loss scale adapts by overflows, so these are skipped and counted. They are a failure
    only if the scale cannot shrink further, or after `MOST_SKIPS` in a row. An optimizer that
    handles non-finite gradients by itself is excused.

    Args:
        health: the health after the forward pass.
        finite: bool scalar, whether all gradients are finite.
        step: number of the step, from 1.
        scale: the loss scale before the update, or None.
        excused: whether gradients may be non-finite.
    """
    if scale is None:
        return health if excused else health.with_flag(~finite, GRADIENT, step)
    skips = jnp.where(finite, 0, health.skips + 1)
    hopeless = ~finite & (scale.is_smallest | (skips >= MOST_SKIPS))
    return health.with_skips(skips).with_flag(hopeless, GRADIENT, step)


def check_arrays(
    health: Health, params: Any, opt_state: Any, step: jax.Array, *, replicated: bool = False
) -> Health:
    """Returns the health after checking the new parameters and optimizer state.

    Args:
        health: the health before the check.
        params: the new parameters.
        opt_state: the new state of the optimizer.
        step: number of the step, from 1.
        replicated: whether every device has all of every parameter.
    """
    arrays, slots = floats(params), floats(opt_state)
    known = health.known

    def check_exactly() -> tuple[jax.Array, jax.Array]:
        bad = has_new_non_finite(arrays, known[: len(arrays)], replicated=replicated)
        return bad, has_new_non_finite(slots, known[len(arrays) :], replicated=replicated)

    if jax.default_backend() == 'cpu':
        # For speed only: usually one contraction shows that all are finite. For 2**20 numbers it
        # takes 0.09 ms of CPU time, the exact check 0.34 ms (jax 0.10.2), which also copies them.
        none = jnp.zeros((), bool)
        bad_params, bad_slots = jax.lax.cond(
            is_surely_finite([*arrays, *slots]), lambda: (none, none), check_exactly
        )
    else:
        bad_params, bad_slots = check_exactly()
    # Parameters first, because the first flag is kept: they matter more than slots.
    health = health.with_flag(bad_params, PARAMETER, step)
    return health.with_flag(bad_slots, SLOT, step)


def handles_non_finite(opt_state: Any) -> bool:
    """Whether an optimizer handles non-finite gradients by itself."""
    kinds = (optax.ApplyIfFiniteState, optax.ZeroNansState, optax.MultiStepsState)
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    for node in nodes:
        if isinstance(node, optax.MultiStepsState):
            # It can skip non-finite gradients; or the optimizer that it wraps handles them.
            if jax.tree.leaves(node.skip_state) or handles_non_finite(node.inner_opt_state):
                return True
        elif isinstance(node, kinds):
            return True
    return False


def _mark_line_search(tree: Any) -> list[int]:
    """Returns for each float leaf 1 if it is a scalar of a line search, which may be non-finite.

    Optax marks a search that has failed by an infinite error.
    """
    kinds = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)

    def mark(node: Any) -> Any:
        if isinstance(node, kinds):
            return jax.tree.map(lambda x: int(not x.shape), node)
        return 0

    marks = jax.tree.map(mark, tree, is_leaf=lambda node: isinstance(node, kinds))
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(marks), strict=True)
    return [number for x, number in pairs if floats(x)]
