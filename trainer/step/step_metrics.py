# SPDX-License-Identifier: Apache-2.0
"""The metrics of a step: those of the task, norms, and learning rates."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainer.config.durations import Periodic
from trainer.step.context import Batch, StepContext
from trainer.step.health import FINDINGS, Findings
from trainer.step.state import TrainState
from trainer.step.step_sizes import factors, learning_rates
from trainer.tasks.metrics import Last, WeightedMean
from trainer.tasks.runner import TaskRunner, run_checks
from trainer.tasks.task import TaskOutput

# Number of elements above which an array leaves the cache of a CPU core before the end of the step,
# and above which a GPU kernel takes longer than its launch.
_LARGE = 2**17


def measure(output: TaskOutput, sums: Any, task: TaskRunner) -> dict[str, Any]:
    """Returns the metrics and findings of a forward pass.

    Args:
        output: what the task returned for the batch.
        sums: the weighted sum of each loss, and the sum of the penalties.
        task: runner of the task.
    """
    label, value = run_checks(output.checks, output.weights)
    penalties = output.penalties.items()
    return {
        # One sum instead of a check of each loss: it is finite only if all of them are.
        FINDINGS: Findings(sum(jax.tree.leaves(sums)), label, value),
        'task': task.measure(output),
        'penalties': {name: WeightedMean.from_model_output(x) for name, x in penalties},
    }


def output_shapes(
    sums_of: Callable[..., Any], state: TrainState, batch: Batch, ctx: StepContext
) -> TaskOutput:
    """Returns the shapes of the task's output; `sums_of` is `train_step.weighted_sums`."""

    def run(state: TrainState, batch: Batch) -> TaskOutput:
        return sums_of(state.params, state, batch, ctx)[1][0]

    return jax.eval_shape(run, dataclasses.replace(state, metrics=None), batch)


def empty_task_metrics(output: TaskOutput, task: TaskRunner) -> dict[str, Any]:
    """Returns empty accumulators for the result of `measure` for outputs of these shapes."""
    return {
        'task': task.empty(output),
        'penalties': {name: WeightedMean.empty() for name in output.penalties},
        FINDINGS: Findings.empty(),
    }


def empty_metrics(output: TaskOutput, state: TrainState, ctx: StepContext) -> dict[str, Any]:
    """Returns empty accumulators for the metrics of a default step."""
    metrics = empty_task_metrics(output, ctx.task)
    # `default_step` removes the findings, which are not written to a row.
    del metrics[FINDINGS]
    metrics['norms'] = {name: Last.empty() for name in ('grad', 'param', 'update')}
    rates = functools.partial(learning_rates, ctx.optimizer)
    known = jax.eval_shape(rates, state.opt_state, state.step)
    metrics.update(jax.tree.map(lambda _: Last.empty(), known))
    if state.loss_scale is not None:
        metrics.update({name: Last.empty() for name in state.loss_scale.metrics()})
    return metrics


def step_metrics(
    old: TrainState, new: TrainState, grads: Any, updates: Any, ctx: StepContext
) -> dict[str, Any]:
    """Returns the norms and learning rates of an update; a row has the values at its step.

    Args:
        old: the state before the update.
        new: the state after the update.
        grads: gradients of all parameters.
        updates: the updates that were added to the parameters.
        ctx: the context of the step.
    """
    assert ctx.facts is not None
    # Norms are needed only at steps with a row. On CPUs they would slow down a small step.
    due = None
    if ctx.log is not None and jax.default_backend() == 'cpu':
        due = is_due(ctx.log, old.step + 1) | (old.step + 1 == ctx.last_step)
    values: dict[str, Any] = {
        'norms': norms(
            grads=grads,
            updates=updates,
            old=old.params,
            new=new.params,
            frozen=ctx.facts.frozen,
            replicated=ctx.facts.replicated,
            due=due,
        )
    }
    # The rate of this update: schedules count the updates before it, without skipped ones.
    count = old.step if old.loss_scale is None else old.step - old.loss_scale.skipped
    rates = ctx.optimizer.learning_rate
    # One rate is the common case, handled here without walking through the optimizer state.
    if ctx.optimizer.groups or isinstance(rates, Mapping):
        by_name = learning_rates(ctx.optimizer, new.opt_state, count)
        values.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), by_name))
    elif rates is not None:
        rate = rates(count)
        if ctx.facts.scales_rates:
            rate = math.prod(factors(new.opt_state), start=rate)
        values['learning_rate'] = jnp.asarray(rate, jnp.float32)
    return jax.tree.map(Last, values)


class _Leaf(NamedTuple):
    """One parameter in a step.

    Frozen parameters count only in the norm of the parameters. If `update` is None, it is computed
    as `new - old`.
    """

    grad: jax.Array
    update: jax.Array | None
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
    replicated: Any = None,
) -> dict[str, jax.Array]:
    """Returns the float32 norms 'grad', 'param' and 'update' of one step.

    Args:
        grads: gradients of all parameters.
        updates: the updates that were added to the parameters.
        old: the parameters before the update.
        new: the parameters after the update.
        frozen: tree of bools: whether 'grad' and 'update' leave a parameter out.
        due: bool scalar, whether the norms of this step are needed; if not, they are 0 and cost
            almost nothing. None always computes them.
        replicated: tree of bools: whether every device has all of a parameter; None if unknown.
    """
    trees = (grads, updates, old, new, frozen)
    leaves = [_Leaf(*x) for x in zip(*map(jax.tree.leaves, trees), strict=True)]
    squares = _batched_squares(leaves, replicated) if due is None else _squares_if_due(due, leaves)
    return dict(zip(('grad', 'param', 'update'), jnp.sqrt(squares), strict=True))


def _squares_if_due(due: jax.Array, leaves: list[_Leaf]) -> jax.Array:
    """Returns the squared norms of gradient, parameters and update if `due`, otherwise zeros.

    For speed only, and on CPUs only: on an accelerator a branch costs more than the norms.
    """
    # CPU time of a step of the MLP (`tests/benchmarks/beside.py OTHER mlp`, 11 pairs, two cores,
    # jax 0.10.2): 0.90 [0.86, 0.99] of that with norms in every step.
    # `lax.cond` keeps its operands alive until it runs. So each large array has a branch of its
    # own, which frees it early; small arrays share one, because a branch costs microseconds.
    groups = [[leaf for leaf in leaves if leaf.new.size <= _LARGE]]
    for leaf in leaves:
        if leaf.new.size > _LARGE:
            # As `new - old`: as an operand, the update would be written to memory just for this.
            is_exact = leaf.new.dtype == jnp.float32
            groups.append([leaf._replace(update=None) if is_exact else leaf])
    zeros = functools.partial(jnp.zeros, 3)
    sums = [jax.lax.cond(due, functools.partial(_squares, group), zeros) for group in groups]
    return functools.reduce(jnp.add, sums)


def _batched_squares(leaves: list[_Leaf], replicated: Any) -> jax.Array:
    """Returns the squared norms of gradient, parameters and update.

    For speed only: small arrays share one kernel, because on an accelerator launching a kernel
    takes longer than the norm of a small array. What this saves has not been measured by itself.
    """
    # Sharded arrays are not concatenated, which would gather them on every device.
    each = [False] * len(leaves) if replicated is None else jax.tree.leaves(replicated)
    groups: dict[bool, list[_Leaf]] = {True: [], False: []}
    for leaf, is_replicated in zip(leaves, each, strict=True):
        groups[is_replicated and leaf.new.size <= _LARGE].append(leaf)
    return _squares(groups[True], at_once=True) + _squares(groups[False])


def _squares(leaves: list[_Leaf], *, at_once: bool = False) -> jax.Array:
    """Returns the squared norms of gradient, parameters and update, float32 (3,).

    Args:
        leaves: the parameters; complex ones count with both parts.
        at_once: whether to concatenate the arrays first.
    """
    # As with `jax.grad`, gradients of frozen parameters exist; they are not used, so not counted.
    trained = [leaf for leaf in leaves if not leaf.frozen]
    updates = [leaf.new - leaf.old if leaf.update is None else leaf.update for leaf in trained]
    sums = []
    for arrays in ([leaf.grad for leaf in trained], [leaf.new for leaf in leaves], updates):
        total = jnp.float32(0)
        for x in [_concatenate(arrays)] if at_once and arrays else arrays:
            squares = []
            for part in (x.real, x.imag) if jnp.iscomplexobj(x) else (x,):
                part, dims = part.astype(jnp.float32), tuple(range(part.ndim))
                # A contraction for speed only: CPU time of a step of the MLP with a row at each
                # step (`tests/benchmarks/beside.py OTHER mlp 'log__every=1 step'`, 9 pairs, jax
                # 0.10.2) 0.85 [0.68, 0.97] of that with a sum of squares.
                contracted = ((dims, dims), ((), ()))
                # Accelerators would otherwise multiply in bfloat16 or TF32.
                exact = jax.lax.Precision.HIGHEST
                squares.append(jax.lax.dot_general(part, part, contracted, precision=exact))
            total = total + functools.reduce(jnp.add, squares)
        sums.append(total)
    return jnp.stack(sums)


def _concatenate(arrays: Sequence[jax.Array]) -> jax.Array:
    parts = [p for x in arrays for p in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    return jnp.concatenate([x.astype(jnp.float32).ravel() for x in parts])


def is_due(periodic: Periodic, step: jax.Array) -> jax.Array:
    """Returns `periodic.is_due(step)` for a traced step; true if it cannot be computed in int32.

    It may be true too often, but never too rarely. After a change of the batch size it is exact
    from the first full step of the new size on, and true before.
    """
    period, progress = periodic.period_steps, periodic.progress
    if period is None:
        return jnp.zeros((), bool)
    ahead = Fraction(0) if progress is None else progress.offset
    den = math.lcm(period.denominator, ahead.denominator)
    num, plus = int(period * den), int(ahead * den)
    # An upper bound of the intermediate values of the expression below.
    if num * (den + 1) >= 2**31:
        return jnp.ones((), bool)
    # step + ahead crosses a multiple of num / den if and only if (step + ahead) * den mod num is
    # less than den.
    due = ((step % num) * den + plus % num) % num < den
    if progress is None:
        return due
    return due | (step <= math.ceil(progress.marks[-1][0]) + 1)
