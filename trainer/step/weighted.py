# SPDX-License-Identifier: Apache-2.0
"""Gradients of several losses, and of batches with examples of weight 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainer.step.context import StepContext
from trainer.step.loss_scale import choose
from trainer.step.optimizer import Optimizer
from trainer.step.state import TrainState
from trainer.tasks import returned
from trainer.tasks.task import TaskOutput


def check_losses(output: TaskOutput, optimizer: Optimizer) -> None:
    """Checks that losses are differentiable, and that each of them trains some parameters.

    Raises:
        UserError: naming the loss for which this is not so.
    """
    optimizer.check_losses(output.loss)
    returned.check_differentiable(output.loss)


def pull(
    pullback: Callable[..., tuple[Any]],
    weights: Mapping[str, jax.Array],
    factors: Mapping[str, Any],
    penalty: Any,
    *,
    name: str | None,
    is_weighted: bool,
) -> Any:
    """Returns the gradient of factor x (the sum of the named loss) + penalty x (penalties).

    Each call is one backward pass; the compiler removes the unused parts of it.

    Args:
        pullback: maps cotangents of (weighted sum of each loss, sum of the penalties) to gradients.
        weights: the sum of weights of each loss.
        factors: factors by name of the loss.
        penalty: factor of the penalties.
        name: name of the loss; None for the penalties alone.
        is_weighted: whether examples can have weight 0.
    """
    # A cotangent of 0 selects nothing of the other losses.
    each = {key: jnp.float32(factors[key] if key == name else 0.0) for key in weights}
    grads = pullback((each, jnp.float32(penalty)))[0]
    if name is None or not is_weighted:
        return grads
    # If no example counts, none can replace the others (see `tasks.weightless`). Then the values of
    # all of them may be anything, and the gradient NaN.
    counts = weights[name] != 0
    return jax.tree.map(lambda g: jnp.where(counts, g, jnp.zeros_like(g)), grads)


def pull_each(
    pullback: Callable[..., tuple[Any]],
    factors: Mapping[str, Any],
    penalty: Any,
    weights: Mapping[str, jax.Array],
    ctx: StepContext,
) -> Any:
    """Returns for each parameter the gradient of its loss: see `pull`."""
    is_weighted = ctx.task.is_weighted is not False
    return ctx.optimizer.select(
        {
            name: pull(pullback, weights, factors, penalty, name=name, is_weighted=is_weighted)
            for name in factors
        }
    )


def select_collections(
    weights: Mapping[str, jax.Array],
    collections: dict[str, Any],
    state: TrainState,
    ctx: StepContext,
) -> dict[str, Any]:
    """Returns the collections after a forward pass, or the old ones if no example counts.

    Examples of weight 0 must not change statistics, so a micro-batch of only these changes none.
    """
    if ctx.task.is_weighted is False:
        return collections
    counts = sum(weights.values(), jnp.float32(0)) != 0
    return choose(counts, collections, state.collections)
