# SPDX-License-Identifier: Apache-2.0
"""Custom steps for the tests."""

from __future__ import annotations

from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import optax


def same(state: Any, batch: Any, ctx: Any) -> Any:
    """The default step, from its two parts."""
    grads, collections, metrics = ctx.gradients(state, batch)
    state, more = ctx.update(state, grads, collections)
    return state, {**metrics, **more}


def step_by_hand(state: Any, batch: Any, ctx: Any) -> Any:
    """The default step, written by hand."""

    def loss_fn(params: Any) -> Any:
        model = ctx.bind(params, state.collections)
        output = ctx.task(model, batch)
        return ctx.loss(output), (model.collections, output)

    grads, (collections, output) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = ctx.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state.replace(params=params, opt_state=opt_state, collections=collections)
    return new, ctx.metrics(output, new, grads)


def own_gradients(state: Any, batch: Any, ctx: Any) -> Any:
    """The default step with gradients by hand."""

    def loss_fn(params: Any) -> Any:
        model = ctx.bind(params)
        output = ctx.task(model, batch)
        return ctx.loss(output), (model.collections, output)

    (loss, (collections, output)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, norms = ctx.update(state, grads, collections, value=loss)
    return state, {**ctx.metrics(output), **norms}


def forgets_gradients(state: Any, batch: Any, ctx: Any) -> Any:
    """A mistake: norms without gradients."""
    return state, ctx.metrics(ctx.task(ctx.bind(), batch), state)


def make_by_hand() -> Any:
    """A target that returns a step."""
    return step_by_hand


def sam(state: Any, batch: Any, ctx: Any, *, rho: float, kind: str = 'l2') -> Any:
    """Two gradients per step, an argument from the config, and metrics of every kind."""
    del kind
    ascent, _, _ = ctx.gradients(state, batch)
    norm = optax.tree.norm(ascent)
    worst = jax.tree.map(lambda p, g: p + rho / norm * g, state.params, ascent)
    grads, collections, metrics = ctx.gradients(state.replace(params=worst), batch)
    state, _ = ctx.update(state.replace(params=state.params), grads, collections)
    noise = jax.random.uniform(ctx.rng('noise'))
    return state, {
        **metrics,
        'ascent/norm': norm,
        'inner': {'noise': noise, 'two': 2},
        'mean': clu.metrics.Average.from_model_output(jnp.arange(3.0)),
    }


def names_norms(state: Any, batch: Any, ctx: Any) -> Any:
    """Returns a metric with the name of a group of metrics."""
    grads, _, metrics = ctx.gradients(state, batch)
    return ctx.update(state, grads)[0], {**metrics, 'norms': optax.tree.norm(grads)}


def names_speed(state: Any, batch: Any, ctx: Any) -> Any:
    """Returns a metric with a reserved name."""
    grads, _, _ = ctx.gradients(state, batch)
    return ctx.update(state, grads)[0], {'steps_per_sec': 1.0}


def twice(state: Any, batch: Any, ctx: Any) -> Any:
    """Two updates on one batch."""
    for _ in range(2):
        grads, collections, _ = ctx.gradients(state, batch)
        state, _ = ctx.update(state, grads, collections)
    return state, {}


def changes_dtype(state: Any, batch: Any, ctx: Any) -> Any:
    """A mistake."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.params)
    return state.replace(params=half), {}


def drops_state(state: Any, batch: Any, ctx: Any) -> Any:
    """A mistake."""
    return state.params, {}


def metric_is_vector(state: Any, batch: Any, ctx: Any) -> Any:
    """A mistake."""
    return state, {'a': {'b': jnp.ones(3)}}


def metrics_is_scalar(state: Any, batch: Any, ctx: Any) -> Any:
    """A mistake."""
    return state, jnp.ones(())


def takes_two(state: Any, batch: Any) -> Any:
    """A mistake."""
    return state, {}
