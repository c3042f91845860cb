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

The rest is for batches with padding or weights (the mean is over what counts), for metrics that
accumulate on the devices, and for updates that stop when a value is not finite. What a config may
add is in other files: `accumulation`, `loss_scale`, `weighted`, `custom_step`, and ensembles.
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
from trainer.step.health import LABELS, LOSS, SIGNS, UPDATED, Signs, check_gradients
from trainer.step.objective import Objective
from trainer.step.state import TrainState
from trainer.step.step_metrics import measure, step_metrics
from trainer.tasks.metrics import merge_metrics
from trainer.tasks.runner import inverse, loss_sums
from trainer.tasks.task import ONLY_LOSS


def default_step(
    state: TrainState, batch: Batch, ctx: StepContext
) -> tuple[TrainState, dict[str, Any]]:
    """The step of a config without `step`: one gradient, one update."""
    grads, collections, metrics, loss = gradients(state, batch, ctx)
    signs = metrics.pop(SIGNS)
    state, more = apply_update(state, grads, collections, ctx, signs=signs, loss=loss)
    return state, {**metrics, **more}


def train_step(
    state: TrainState, batch: Batch, ctx: StepContext, function: StepFunction = default_step
) -> TrainState:
    """Returns the state after one step, its metrics added to those since the last row."""
    before = dataclasses.replace(state, metrics=None)
    new, metrics = function(before, batch, ctx)
    if ctx.optimizer.freeze_statistics:
        collections = ctx.optimizer.held(state.collections, new.collections)
        new = dataclasses.replace(new, collections=collections)
    if ctx.watches and ctx.stops and ctx.sweeps:
        new = sweep.check_update(new, before, ctx)
    return dataclasses.replace(new, metrics=merge_metrics(state.metrics, metrics))


def gradients(
    state: TrainState, batch: Batch, ctx: StepContext
) -> tuple[Any, dict[str, Any], dict[str, Any], Objective]:
    """Returns the gradient of the batch's loss, the new collections, metrics, and the loss itself.

    The loss is the weighted mean over the global batch, plus the penalties. With several losses,
    each parameter gets the gradient of its own loss. Under a loss scale the backward pass is of the
    scaled loss; what is returned is not scaled. Gradients of half-precision parameters are float32:
    after unscaling, small ones would underflow in float16. Those of complex parameters are the
    conjugate of what JAX returns.
    """
    scale = jnp.ones((), jnp.float32) if state.loss_scale is None else state.loss_scale.scale
    if ctx.accumulate > 1:
        grads, collections, metrics, value = accumulation.gradients(
            weighted_sums, state, batch, scale, ctx
        )
    else:
        sums_at = functools.partial(weighted_sums, state=state, batch=batch, ctx=ctx)
        sums, pullback, (output, collections, weights) = jax.vjp(
            sums_at, state.params, has_aux=True
        )
        shares = {name: inverse(weight) for name, weight in weights.items()}
        factors = {name: scale * share for name, share in shares.items()}
        if len(factors) == 1 and ctx.task.is_weighted is False:
            (grads,) = pullback((factors, scale))
        else:
            grads = weighted.pull_each(pullback, factors, scale, weights, ctx)
            collections = weighted.if_any_counts(weights, collections, state, ctx)
        metrics = measure(output, sums, ctx.task)
        losses = {name: total * shares[name] + sums[1] for name, total in sums[0].items()}
        value = losses[ONLY_LOSS] if tuple(losses) == (ONLY_LOSS,) else losses
    if state.loss_scale is not None or any(g.dtype != jnp.float32 for g in jax.tree.leaves(grads)):
        grads = loss_scale.as_optimizers_expect(grads, state.loss_scale)
    loss_at = functools.partial(accumulation.loss_at, weighted_sums, state, batch, ctx)
    return grads, collections, metrics, Objective(value, loss_at)


def weighted_sums(
    params: Any, state: TrainState, batch: Batch, ctx: StepContext, index: Any = 0
) -> tuple[Any, Any]:
    """Runs the task on a batch, or on a slice of one.

    Returns:
        What is differentiated: each loss's sum of weight x value, and the sum of the penalties.
        And what comes with it: the task's output, the new collections, each loss's sum of weights.
    """
    keys = Keys(seed=ctx.seed, mode='train', step=state.step, index=index)
    average = None if state.ema is None else state.average
    model = ctx.model.bind({'params': params, **state.collections}, keys, ema=average)
    output = ctx.task(model, batch)
    if ctx.task.is_weighted is None:  # While the shapes are traced, before anything is compiled.
        weighted.check_losses(output, ctx.optimizer)
    totals, weights, penalties = loss_sums(output)
    return (totals, penalties), (output, model.own_collections, weights)


def apply_update(
    state: TrainState,
    grads: Any,
    collections: Any,
    ctx: StepContext,
    *,
    signs: Signs | None = None,
    loss: Objective | None = None,
    extra: Mapping[str, Any] | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state after the optimizer's update, and its norms and learning rates.

    Args:
        state: before the update.
        grads: as `gradients` returns them.
        collections: all variables that are not parameters, after the forward pass.
        ctx: of the step.
        signs: what was found in the forward pass.
        loss: that the gradients are of, for optimizers that ask for its value.
        extra: arguments of the optimizer by name, from a step of the user's.
    """
    assert ctx.facts is not None
    given = {} if loss is None else {'value': loss.value, 'grad': grads, 'value_fn': loss.function}
    if loss is not None and ctx.facts.asks_more:
        given = objective.arguments(loss, grads, state)
    extra = {} if extra is None else extra
    update = functools.partial(ctx.facts.tx.update, grads, state.opt_state, state.params)
    try:
        updates, opt_state = update(**{**given, **extra})
    except Exception as error:
        updates, opt_state = objective.update_without(error, update, state, given, extra)
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        collections=collections,
    )
    if ctx.ema_decay is not None:
        new = dataclasses.replace(new, ema=ema.moved(state.ema, new.params, ctx.ema_decay))
    metrics: dict[str, Any] = {}
    finite = None
    if ctx.sweeps or state.loss_scale is not None:
        finite = all_finite(grads, whole=ctx.facts.all_whole)
    if finite is not None and state.loss_scale is not None:
        new, updates, metrics = loss_scale.skip_overflow(new, state, updates, finite)
    if state.health is not None:
        new = skip_if_not_finite(new, state, signs, finite, ctx)
    return new, {**metrics, **step_metrics(state, new, grads, updates, ctx)}


def skip_if_not_finite(
    new: TrainState,
    old: TrainState,
    signs: Signs | None,
    finite: jax.Array | None,
    ctx: StepContext,
) -> TrainState:
    """Returns the new state, or the old values from the first step on that is not finite.

    Args:
        new: after the update.
        old: before it.
        signs: what was found in the forward pass; None if that was not looked at.
        finite: bool scalar, whether all gradients are; None if they were not looked at.
        ctx: of the step.
    """
    assert old.health is not None and ctx.facts is not None
    health, step = old.health, old.step + 1
    # Where the optimizer or the loss scale has a rule for them, losses may be non-finite.
    excused = ctx.facts.handles_non_finite or old.loss_scale is not None
    if signs is not None:
        health = health.flagged(signs.label > 0, LABELS + signs.label - 1, step, signs.value)
        if ctx.stops and not excused:
            health = health.flagged(~jnp.isfinite(signs.losses), LOSS, step)
    if not ctx.stops:
        return dataclasses.replace(new, health=health)
    if finite is not None:
        health = check_gradients(health, finite, step, old.loss_scale, excused=excused)
    fields = UPDATED if ctx.sweeps else tuple(name for name in UPDATED if name != 'opt_state')
    keep = functools.partial(jax.tree.map, functools.partial(jnp.where, health.is_bad))
    kept = {name: keep(getattr(old, name), getattr(new, name)) for name in fields}
    return dataclasses.replace(new, **kept, health=health)
