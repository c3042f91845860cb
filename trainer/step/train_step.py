# SPDX-License-Identifier: Apache-2.0
"""The train step, from top to bottom. In plain JAX it comes to::

    def step(state, batch):
        def loss_of(params):
            loss, accuracy = task(model.bind(params), batch)
            return loss.mean(), accuracy

        (loss, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), accuracy

The rest handles batches with padding or weights (the mean is weighted), metrics that accumulate on
the devices, and updates that stop when a value is not finite. Optional features are in other
modules: `accumulation`, `loss_scale`, `weighted`, `custom_step`, and the package `ensemble`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.modules.rng import Keys
from trainer.step import accumulation, ema, loss_scale, objective, sweep, weighted
from trainer.step.context import Batch, StepContext, StepFunction
from trainer.step.finite import all_finite
from trainer.step.health import FINDINGS, LABELS, LOSS, UPDATED, Findings, check_gradients
from trainer.step.objective import Objective
from trainer.step.state import TrainState
from trainer.step.step_metrics import measure, step_metrics
from trainer.tasks.metrics import merge_metrics
from trainer.tasks.runner import loss_sums, safe_inverse
from trainer.tasks.task import ONLY_LOSS


def default_step(
    state: TrainState, batch: Batch, ctx: StepContext
) -> tuple[TrainState, dict[str, Any]]:
    """Computes one gradient and makes one update: the step of a config without `step`."""
    grads, collections, metrics, loss = gradients(state, batch, ctx)
    # The findings of the forward pass are returned as a metric, so that those of micro-batches are
    # merged. They are not written to a row.
    findings = metrics.pop(FINDINGS)
    state, more = apply_update(state, grads, collections, ctx, findings=findings, loss=loss)
    return state, {**metrics, **more}


def train_step(
    state: TrainState, batch: Batch, ctx: StepContext, function: StepFunction = default_step
) -> TrainState:
    """Returns the state after one step, its metrics merged into those since the last row."""
    # Without the accumulated metrics, so that no step function can depend on when rows are logged.
    before = dataclasses.replace(state, metrics=None)
    new, metrics = function(before, batch, ctx)
    if ctx.optimizer.freeze_statistics:
        # Here and not in `apply_update`, so that it holds for a custom step too.
        collections = ctx.optimizer.keep_frozen_statistics(state.collections, new.collections)
        new = dataclasses.replace(new, collections=collections)
    # Last, because it checks the parameters and optimizer slots that the step has written.
    if ctx.tracks_health and ctx.stops and ctx.sweeps:
        new = sweep.check_update(new, before, ctx)
    return dataclasses.replace(new, metrics=merge_metrics(state.metrics, metrics))


def gradients(
    state: TrainState, batch: Batch, ctx: StepContext
) -> tuple[Any, dict[str, Any], dict[str, Any], Objective]:
    """Returns the gradient of the batch's loss, the new collections, the metrics, and the loss.

    The loss is the weighted mean over the global batch, plus the penalties. With several losses,
    each parameter gets the gradient of its own loss. With a loss scale, the backward pass
    differentiates the scaled loss, and the returned gradients are unscaled. Gradients of
    half-precision parameters are float32, because small ones would underflow in float16 once they
    are unscaled. Gradients of complex parameters are the conjugates of what JAX returns.
    """
    scale = jnp.ones((), jnp.float32) if state.loss_scale is None else state.loss_scale.scale
    if ctx.accumulate > 1:
        grads, collections, metrics, value = accumulation.gradients(
            weighted_sums, state, batch, scale, ctx
        )
    else:
        # `jax.vjp` of the sums, not `value_and_grad` of the mean: the loss scale and the inverse
        # weights enter as cotangents, and with several losses each one gets its own backward pass.
        sums_at = functools.partial(weighted_sums, state=state, batch=batch, ctx=ctx)
        sums, pullback, (output, collections, weights) = jax.vjp(
            sums_at, state.params, has_aux=True
        )
        shares = {name: safe_inverse(weight) for name, weight in weights.items()}
        factors = {name: scale * share for name, share in shares.items()}
        if len(factors) == 1 and ctx.task.is_weighted is False:
            # One loss, and every example counts: a single backward pass, and nothing to mask.
            (grads,) = pullback((factors, scale))
        else:
            grads = weighted.pull_each(pullback, factors, scale, weights, ctx)
            collections = weighted.select_collections(weights, collections, state, ctx)
        metrics = measure(output, sums, ctx.task)
        losses = {name: total * shares[name] + sums[1] for name, total in sums[0].items()}
        value = losses[ONLY_LOSS] if tuple(losses) == (ONLY_LOSS,) else losses
    # Also for complex parameters without a loss scale: optimizers expect conjugate gradients.
    if state.loss_scale is not None or any(g.dtype != jnp.float32 for g in jax.tree.leaves(grads)):
        grads = loss_scale.to_optimizer_gradients(grads, state.loss_scale)
    # For optimizers that evaluate the loss at other parameters (line searches, SAM). Others ignore
    # it, and nothing is traced.
    loss_at = functools.partial(accumulation.loss_at, weighted_sums, state, batch, ctx)
    return grads, collections, metrics, Objective(value, loss_at)


def weighted_sums(
    params: Any, state: TrainState, batch: Batch, ctx: StepContext, index: Any = 0
) -> tuple[Any, Any]:
    """Runs the task on a batch, or on a micro-batch of it.

    Args:
        params: the parameters to differentiate.
        state: everything else that the model reads.
        batch: arrays (batch, ...).
        ctx: the context of the step.
        index: number of the micro-batch, so that each one draws its own random numbers.

    Returns:
        The values that are differentiated: the sum of weight x value of each loss, and the sum of
        the penalties. And the auxiliary values: the task's output, the new collections, and the sum
        of weights of each loss.
    """
    # Keys depend on seed, step and micro-batch alone: a resumed run, and a second call at other
    # parameters, draw the same random numbers.
    keys = Keys(seed=ctx.seed, mode='train', step=state.step, index=index)
    average = None if state.ema is None else state.average
    model = ctx.model.bind({'params': params, **state.collections}, keys, ema=average)
    output = ctx.task(model, batch)
    if ctx.task.is_weighted is None:
        # `is_weighted` is None only in the first trace, of the shapes. So mistakes in a task are
        # reported before anything is compiled.
        weighted.check_losses(output, ctx.optimizer)
    totals, weights, penalties = loss_sums(output)
    return (totals, penalties), (output, model.own_collections, weights)


def apply_update(
    state: TrainState,
    grads: Any,
    collections: Any,
    ctx: StepContext,
    *,
    findings: Findings | None = None,
    loss: Objective | None = None,
    extra: Mapping[str, Any] | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state after the optimizer's update, and its norms and learning rates.

    Args:
        state: the state before the update.
        grads: the gradients, as `gradients` returns them.
        collections: all variables but the parameters, after the forward pass.
        ctx: the context of the step.
        findings: the findings of the forward pass; None if it was not checked.
        loss: the loss that was differentiated, for optimizers that take its value.
        extra: further arguments of the optimizer by name, from a custom step.
    """
    assert ctx.facts is not None
    given = {} if loss is None else {'value': loss.value, 'grad': grads, 'value_fn': loss.function}
    if loss is not None and ctx.facts.needs_extra_arguments:
        given = objective.arguments(loss, grads, state)
    extra = {} if extra is None else extra
    update = functools.partial(ctx.facts.tx.update, grads, state.opt_state, state.params)
    try:
        updates, opt_state = update(**{**given, **extra})
    except Exception as error:
        # Tracing fails if an optimizer rejects extra arguments; and optax names no config key.
        updates, opt_state = objective.retry_update(error, update, state, given, extra)
    before: Any = jax.tree.structure((state.params, state.opt_state))
    if before != jax.tree.structure((updates, opt_state)):
        raise objective.structure_error(updates, opt_state, state)
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        collections=collections,
    )
    if ctx.ema_decay is not None:
        new = dataclasses.replace(new, ema=ema.update(state.ema, new.params, ctx.ema_decay))
    metrics: dict[str, Any] = {}
    # One pass over all gradients for both checks below; none if neither needs it.
    finite = None
    if ctx.sweeps or state.loss_scale is not None:
        finite = all_finite(grads, replicated=ctx.facts.all_replicated)
    # Before the health check: the scale skips an overflow, which is not a failure of the run.
    if finite is not None and state.loss_scale is not None:
        new, updates, metrics = loss_scale.skip_overflow(new, state, updates, finite)
    if state.health is not None:
        new = skip_if_not_finite(new, state, findings, finite, ctx)
    # After both, so that the logged norms are those of the update that was made.
    return new, {**metrics, **step_metrics(state, new, grads, updates, ctx)}


def skip_if_not_finite(
    new: TrainState,
    old: TrainState,
    findings: Findings | None,
    finite: jax.Array | None,
    ctx: StepContext,
) -> TrainState:
    """Returns the new state; from the first non-finite step on, the old values.

    Args:
        new: the state after the update.
        old: the state before the update.
        findings: the findings of the forward pass; None if it was not checked.
        finite: bool scalar, whether all gradients are finite; None if they were not checked.
        ctx: the context of the step.
    """
    assert old.health is not None and ctx.facts is not None
    health, step = old.health, old.step + 1
    # A non-finite loss is not a failure if the optimizer or the loss scale handles it.
    excused = ctx.facts.handles_non_finite or old.loss_scale is not None
    if findings is not None:
        # Labels first: a label out of range explains a NaN loss, and the first flag is kept.
        health = health.with_flag(
            findings.label > 0, LABELS + findings.label - 1, step, findings.value
        )
        if ctx.stops and not excused:
            health = health.with_flag(~jnp.isfinite(findings.losses), LOSS, step)
    if not ctx.stops:
        return dataclasses.replace(new, health=health)
    if finite is not None:
        health = check_gradients(health, finite, step, old.loss_scale, excused=excused)
    # Without a sweep (on CPUs), the slots advance: keeping the old ones would copy them each step.
    fields = UPDATED if ctx.sweeps else tuple(name for name in UPDATED if name != 'opt_state')
    # `health.is_bad` is sticky, so every later step keeps the old values too.
    keep = functools.partial(jax.tree.map, functools.partial(jnp.where, health.is_bad))
    kept = {name: keep(getattr(old, name), getattr(new, name)) for name in fields}
    return dataclasses.replace(new, **kept, health=health)
