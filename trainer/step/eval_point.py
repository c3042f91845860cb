# SPDX-License-Identifier: Apache-2.0
"""Evaluation parameters of optimizers whose training parameters are not meant for evaluation.

A schedule-free optimizer computes gradients at one point and is evaluated at another, an average;
`config.optimizer.eval_params` names the function that computes it from the optimizer state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from trainer.config.errors import UserError
from trainer.modules.model_view import param_path
from trainer.step import views
from trainer.step.optimizer import Optimizer
from trainer.step.views import contains_state
from trainer.tasks.returned import name_of


def has_eval_params(optimizer: Optimizer) -> bool:
    """Whether an optimizer, or the optimizer of one of its groups, has `eval_params`."""
    groups = [group.optimizer for group in optimizer.groups.values()]
    return any(each.eval_params is not None for each in (optimizer, *groups))


def compute_eval_params(optimizer: Optimizer, params: Any, opt_state: Any) -> Any:
    """Returns the parameters to evaluate, in the dtypes of the parameters.

    Args:
        optimizer: the optimizer; it or its groups have `eval_params`.
        params: the training parameters.
        opt_state: the state of `optimizer.transformation(params)`.

    Raises:
        UserError: if `eval_params` fails with this optimizer's state, or returns something other
            than parameters.
    """
    # In float32, like the state: in half precision, the difference between the two sets of
    # parameters could be rounded away.
    new = _compute(optimizer, views.to_float32(params), opt_state)
    return jax.tree.map(lambda old, new: new.astype(old.dtype), params, new)


def _compute(optimizer: Optimizer, params: Any, opt_state: Any) -> Any:
    if not has_eval_params(optimizer):
        return params
    state = optimizer.state_of_base(opt_state)
    # The function gets the view that the optimizer had: frozen parameters are masked out.
    trained = jax.tree.map(
        lambda frozen, x: optax.MaskedNode() if frozen else x, optimizer.frozen_mask(params), params
    )
    if not optimizer.groups:
        return _fill(_call_eval_params(optimizer, trained, state), params)
    owners = optimizer.owners(params)
    # Group by group: each call sees the parameters of its group, and the others masked.
    for name, group in optimizer.groups.items():
        members = jax.tree_util.tree_map_with_path(
            lambda path, x, name=name: (
                x if owners.get(param_path(path)) == name else optax.MaskedNode()
            ),
            trained,
        )
        new = _compute(group.optimizer, members, state.inner_states[name].inner_state)
        params = _fill(new, params)
    return params


def _fill(some: Any, rest: Any) -> Any:
    """Returns `some`, with its masked leaves replaced by those of `rest`."""
    return jax.tree.map(lambda x, y: y if _is_masked(x) else x, some, rest, is_leaf=_is_masked)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _call_eval_params(optimizer: Optimizer, params: Any, state: Any) -> Any:
    """Calls `eval_params` with the state and the parameters in the optimizer's view."""
    assert optimizer.eval_params is not None
    where = f'{optimizer.path}.eval_params'
    mine = views.split(params)
    # As in updates, the optimizer sees complex numbers as pairs: its formulas are for real ones.
    try:
        result = optimizer.eval_params(views.split(state), mine)
    except Exception as error:
        accumulates = contains_state(state, optax.MultiStepsState)
        raise UserError(
            f'{where}: {name_of(optimizer.eval_params)} was called with the state of the optimizer '
            f'({type(state).__name__}) and the parameters, and failed: {type(error).__name__}: '
            f'{error}. Name a function (state, parameters) -> parameters for this optimizer'
            + (', and accumulate with config.accumulate, not optax:MultiSteps' * accumulates)
        ) from error
    expected, actual = _shapes_by_path(mine), _shapes_by_path(result)
    if expected != actual:
        paths = [path for path in {**expected, **actual} if expected.get(path) != actual.get(path)]
        raise UserError(
            f'{where}: {name_of(optimizer.eval_params)} must return parameters with the same paths '
            f'and shapes as its arguments; they differ at {", ".join(paths[:5])}'
        )
    return views.merge(jax.tree.map(jnp.asarray, result))


def _shapes_by_path(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {param_path(path): jnp.shape(x) for path, x in leaves}


def adversarial(state: contrib.SAMState, params: Any) -> Any:
    """Returns the parameters of `optax.contrib.sam` without adversarial steps, as `eval_params`.

    Args:
        state: the state of `optax.contrib.sam`.
        params: the training parameters.
    """
    # Right after a synchronization the training parameters are those; during the adversarial steps
    # the state has a copy of them.
    is_synced = state.steps_since_sync == 0
    return jax.tree.map(lambda now, kept: jnp.where(is_synced, now, kept), params, state.cache)
