# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation over micro-batches (`config.accumulate`); the update is that of the batch.

Gradients of the weighted sums are added up and divided by the weight of the whole batch. A mean of
the gradients of the micro-batches would be wrong if their weights differ. In this module `sums_of`
is `train_step.weighted_sums`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.errors import UserError
from trainer.modules.precision import accumulation_dtype
from trainer.step import views, weighted
from trainer.step.context import Batch, StepContext
from trainer.step.state import TrainState
from trainer.step.step_metrics import empty_task_metrics, measure, output_shapes
from trainer.tasks.metrics import merge_metrics
from trainer.tasks.runner import losses_by_name, mean_loss, safe_inverse

SumsOf = Callable[..., tuple[Any, Any]]


def gradients(
    sums_of: SumsOf, state: TrainState, batch: Batch, scale: jax.Array, ctx: StepContext
) -> tuple[Any, dict[str, Any], dict[str, Any], Any]:
    """Returns the scaled gradient, the new collections, the metrics and the unscaled loss."""
    # The scan needs its first carry, so the shapes of the task's output are found beforehand.
    first = jax.tree.map(lambda x: x[0], split_micro_batches(batch, ctx.accumulate, ctx.shards))
    output = output_shapes(sums_of, state, first, ctx)
    # The weight of all micro-batches is known only after the last one. So cotangents are divided by
    # the number of values first, which keeps them as small as without accumulation (they would
    # overflow in float16), and the result is corrected at the end.
    losses = losses_by_name(output.loss).items()
    counts = {name: ctx.accumulate * max(1, math.prod(x.shape)) for name, x in losses}

    def body(carry: Any, item: Any) -> tuple[Any, Any]:
        grads, penalties, collections, metrics, totals = carry
        index, micro_batch = item
        # Batch statistics go from one micro-batch to the next, as from one step to the next.
        before = dataclasses.replace(state, collections=collections)
        sums, pullback, (output, collections, weights) = jax.vjp(
            lambda params: sums_of(params, before, micro_batch, ctx, index),
            state.params,
            has_aux=True,
        )
        collections = weighted.select_collections(weights, collections, before, ctx)
        factors = {name: scale / count for name, count in counts.items()}
        new = weighted.pull_each(pullback, factors, 0.0, weights, ctx)
        grads = jax.tree.map(jnp.add, grads, new)
        if output.penalties:
            # Apart from the losses, because penalties are averaged over the micro-batches, whatever
            # the weights of their examples: the correction below must not touch them.
            factor = scale / ctx.accumulate
            mine = weighted.pull(pullback, weights, {}, factor, name=None, is_weighted=False)
            penalties = jax.tree.map(jnp.add, penalties, mine)
        metrics = merge_metrics(metrics, measure(output, sums, ctx.task))
        totals = jax.tree.map(jnp.add, totals, weights)
        return (grads, penalties, collections, metrics, totals), (*sums, weights)

    # In float32: in sums of many small terms, bfloat16 would lose the later ones.
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, accumulation_dtype(p)), state.params)
    none = {name: jnp.zeros((), jnp.float32) for name in counts}
    carry = (zeros, zeros, state.collections, empty_task_metrics(output, ctx.task), none)
    carry, sums = _scan(body, carry, batch, ctx)
    grads, penalties, collections, metrics, weights = carry
    # The correction: from the number of values to their weight. Each parameter needs that of its
    # own loss, so the factors are trees shaped like the parameters.
    corrections = {name: count * safe_inverse(weights[name]) for name, count in counts.items()}
    factors = {name: jax.tree.map(lambda _, x=x: x, zeros) for name, x in corrections.items()}
    grads = jax.tree.map(
        lambda grad, factor, penalty: grad * factor + penalty,
        grads,
        ctx.optimizer.select(factors),
        penalties,
    )
    return grads, collections, metrics, _mean_loss_over_micro_batches(*sums)


def loss_at(sums_of: SumsOf, state: TrainState, batch: Batch, ctx: StepContext, params: Any) -> Any:
    """Returns the loss of a batch at other parameters, given in the optimizer's view.

    It uses the same random keys and collections as the gradient of the step.

    Raises:
        UserError: with a loss scale.
    """
    if state.loss_scale is not None:
        raise UserError(
            f'{ctx.optimizer.path}: this optimizer computes the loss at other parameters, as a '
            'line search does, but a dynamic loss scale (config.precision.loss_scale) covers only '
            'the gradient of the step; other gradients would vanish in float16. Use bfloat16, or '
            'set config.precision.loss_scale=0'
        )
    params = views.complete_params(params, state.params)
    if ctx.accumulate == 1:
        sums, (_, _, weights) = sums_of(params, state, batch, ctx)
        return mean_loss(sums, weights)

    def body(collections: Any, item: Any) -> tuple[Any, Any]:
        index, micro_batch = item
        before = dataclasses.replace(state, collections=collections)
        sums, (_, collections, weights) = sums_of(params, before, micro_batch, ctx, index)
        return weighted.select_collections(weights, collections, before, ctx), (*sums, weights)

    _, sums = _scan(body, state.collections, batch, ctx)
    return _mean_loss_over_micro_batches(*sums)


def _scan(body: Any, carry: Any, batch: Batch, ctx: StepContext) -> tuple[Any, Any]:
    """Runs `body(carry, (index, micro_batch))` over the micro-batches of a batch."""
    micro_batches = split_micro_batches(batch, ctx.accumulate, ctx.shards)
    # Unrolled for speed only, and on CPUs only, where XLA's convolutions are slow inside a scan.
    # CPU time of a step of the CNN (`tests/benchmarks/beside.py OTHER cnn accumulate=4`, 9 pairs,
    # jax 0.10.2): 0.11 [0.11, 0.12] of that of a loop. Not measured on accelerators.
    unroll = ctx.accumulate if jax.default_backend() == 'cpu' else 1
    # The index is folded into the random keys, so that dropout differs between micro-batches.
    items = (jnp.arange(ctx.accumulate), micro_batches)
    return jax.lax.scan(body, carry, items, unroll=unroll)


def _mean_loss_over_micro_batches(totals: Any, penalties: Any, weights: Any) -> Any:
    """Returns the loss of a batch from the sums of its micro-batches, each (micro-batches,)."""
    totals, weights = jax.tree.map(lambda x: x.sum(0), (totals, weights))
    return mean_loss((totals, penalties.mean(0)), weights)


def split_micro_batches(batch: Any, count: int, shards: int) -> Any:
    """Splits every array (batch, ...) into (count, batch / count, ...).

    Args:
        batch: pytree of arrays whose dimension 0 is sharded over the devices.
        count: number of micro-batches.
        shards: number of devices that share the examples of the batch.
    """

    def split(x: jax.Array) -> jax.Array:
        size = x.shape[0] // (shards * count)
        # Each micro-batch gets an equal part of the examples of every device. Consecutive examples
        # would be those of a few devices, and would have to be sent to the others.
        x = x.reshape(shards, count, size, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(count, shards * size, *x.shape[3:])

    return jax.tree.map(split, batch)
