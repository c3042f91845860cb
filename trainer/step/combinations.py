# SPDX-License-Identifier: Apache-2.0
"""Checks that other config keys work with the optimizer, which is recognized by its state."""

from __future__ import annotations

import logging
from typing import Any

import jax
import optax
from optax import contrib

from trainer.config.errors import UserError
from trainer.step.optimizer import Optimizer
from trainer.step.views import contains_state

_log = logging.getLogger('trainer')

# State types of optimizers that are not evaluated at the training parameters, and the function
# that computes the evaluation parameters.
_EVAL_PARAMS = {
    contrib.ScheduleFreeState: 'optax.contrib:schedule_free_eval_params',
    contrib.SAMState: 'trainer.step.eval_point:adversarial',
}
# State types with a second set of parameters, which scaling the update does not affect.
_SECOND_PARAMS = (contrib.ScheduleFreeState, contrib.SAMState, contrib.MechanicState)

_ACCUMULATE = (
    'Use config.accumulate, which accumulates gradients within one step, instead of '
    'optax:MultiSteps'
)


def check(optimizer: Optimizer, opt_state: Any, *, ema: bool, is_custom_step: bool = False) -> None:
    """Checks that the step can call an optimizer, and that other config keys work with it.

    Args:
        optimizer: the optimizer of the run.
        opt_state: state of the optimizer, or its shapes.
        ema: whether the run keeps a moving average of the parameters.
        is_custom_step: whether `config.step` replaces the default step.

    Raises:
        UserError: for an optimizer that the step cannot call, and for keys that would not do what
            their names say.
    """
    # States are found at any depth: the optimizer may be inside optax:chain or another wrapper.
    for each, state in _parts(optimizer, opt_state):
        if not each.groups:
            _check_interface(each.path, state, is_custom_step=is_custom_step)
    if ema and contains_state(opt_state, optax.MultiStepsState):
        raise UserError(
            'config.ema: the average would be updated at every step, but optax:MultiSteps updates '
            f'the parameters only every few steps. {_ACCUMULATE}'
        )
    for each, state in _parts(optimizer, opt_state):
        if each.clip_norm is not None and contains_state(state, optax.MultiStepsState):
            raise UserError(
                f"{each.path}.clip_norm: it would clip each step's gradient before "
                f'optax:MultiSteps averages them. {_ACCUMULATE}; or clip inside of it, with '
                'optax:chain of optax:clip_by_global_norm and the optimizer'
            )
        if each.lr_multipliers and contains_state(state, _SECOND_PARAMS):
            raise UserError(
                f'{each.path}.lr_multipliers: they scale the update, but not the second set of '
                'parameters in the state of a schedule-free optimizer, optax.contrib:sam or '
                'optax.contrib:mechanize. Use one group per learning rate: config.optimizer.groups'
            )


def _check_interface(path: str, state: Any, *, is_custom_step: bool) -> None:
    """Checks that an optimizer takes gradients of the batch and one set of parameters."""
    if contains_state(state, optax.LookaheadState):
        raise UserError(
            f'{path}: optax:lookahead needs two sets of parameters, fast and slow ones, but the '
            'train state has one. Use its fast_optimizer alone; config.ema keeps an average of the '
            'parameters, and evals.NAME.ema=True evaluates it'
        )
    if contains_state(state, contrib.DifferentiallyPrivateAggregateState) and not is_custom_step:
        raise UserError(
            f'{path}: optax.contrib:dpsgd (differentially_private_aggregate) needs a gradient of '
            'each example, but the default step computes that of the batch. Compute them in a '
            'custom step (config.step, with jax.vmap of jax.grad), and pass them to ctx.update. '
            'optax:noisy_sgd adds noise to the gradient of the batch, without a guarantee of '
            'privacy'
        )


def warn_about_eval_params(optimizer: Optimizer, opt_state: Any) -> None:
    """Warns if an optimizer that needs `eval_params` has none."""
    for each, state in _parts(optimizer, opt_state):
        if each.groups or each.eval_params is not None:
            continue
        for kind, function in _EVAL_PARAMS.items():
            if contains_state(state, kind) and not _is_opaque(state):
                _log.warning(
                    '%s: evaluations use the training parameters, but this optimizer is meant to '
                    "be evaluated at others: set %s.eval_params=dict(ref='%s')",
                    each.path,
                    each.path,
                    function,
                )


def _is_opaque(state: Any) -> bool:
    """Whether a state is that of `optax.contrib:sam` in its opaque mode.

    That mode makes the adversarial steps within one update, so the parameters between updates are
    those to evaluate.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, contrib.SAMState))
    return any(isinstance(x, contrib.SAMState) and x.cache is None for x in nodes)


def _parts(optimizer: Optimizer, opt_state: Any) -> list[tuple[Optimizer, Any]]:
    """Returns the optimizer and the optimizers of its groups, each with its state."""
    state = optimizer.state_of_base(opt_state)
    groups = optimizer.groups.items()
    parts = [(group.optimizer, state.inner_states[name].inner_state) for name, group in groups]
    return [
        (optimizer, state),
        *((each, each.state_of_base(inner)) for each, inner in parts),
    ]
