# SPDX-License-Identifier: Apache-2.0
"""What an optimizer's state says of the keys beside it: combinations that are wrong, or unusual."""

from __future__ import annotations

import logging
from typing import Any

import optax
from optax import contrib

from trainer.config.errors import UserError
from trainer.step.eval_point import holds
from trainer.step.optimizer import Optimizer

_log = logging.getLogger('trainer')

# The state of optimizers that are evaluated at another point than that of their parameters, and
# what works that point out.
_ELSEWHERE = {
    contrib.ScheduleFreeState: 'optax.contrib:schedule_free_eval_params',
    contrib.SAMState: 'trainer.step.eval_point:adversarial',
}
# Of those that keep points of their own, which no factor on the update moves along.
_OWN_POINTS = (contrib.ScheduleFreeState, contrib.SAMState, contrib.MechanicState)

_ACCUMULATE = (
    'Use config.accumulate, which makes one update of several slices within a step, in place of '
    'optax:MultiSteps'
)


def check(optimizer: Optimizer, opt_state: Any, *, ema: bool) -> None:
    """Checks that what surrounds an optimizer is right for it.

    Args:
        optimizer: of the run.
        opt_state: its state, or the shapes of it.
        ema: whether the run keeps a moving average of the parameters.

    Raises:
        UserError: for keys that would do something else than they say.
    """
    if ema and holds(opt_state, optax.MultiStepsState):
        raise UserError(
            'config.ema: the average would move at every step, and optax:MultiSteps changes the '
            f'parameters in one of several. {_ACCUMULATE}'
        )
    for each, state in _parts(optimizer, opt_state):
        if each.clip_norm is not None and holds(state, optax.MultiStepsState):
            raise UserError(
                f'{each.path}.clip_norm: it would clip the gradient of each step, and '
                f'optax:MultiSteps takes the mean of several for an update. {_ACCUMULATE}; or clip '
                'within it: optax:chain of optax:clip_by_global_norm and the optimizer'
            )
        if each.lr_multipliers and holds(state, _OWN_POINTS):
            raise UserError(
                f'{each.path}.lr_multipliers: they scale the update, and not the point that a '
                'schedule-free optimizer, optax.contrib:sam or optax.contrib:mechanize keeps '
                'beside the parameters. Give each learning rate a group: config.optimizer.groups'
            )


def warn_of_eval_point(optimizer: Optimizer, opt_state: Any) -> None:
    """Says where a model is evaluated at a point that its optimizer is not meant for."""
    for each, state in _parts(optimizer, opt_state):
        if each.groups or each.eval_params is not None:
            continue
        for kind, function in _ELSEWHERE.items():
            if holds(state, kind):
                _log.warning(
                    '%s: evaluations use the parameters of training, and this optimizer is meant '
                    "to be evaluated at another point: set %s.eval_params=dict(ref='%s')",
                    each.path,
                    each.path,
                    function,
                )


def _parts(optimizer: Optimizer, opt_state: Any) -> list[tuple[Optimizer, Any]]:
    """Returns the optimizer and those of its groups, each with its own state."""
    state = optimizer.state_of_base(opt_state)
    groups = optimizer.groups.items()
    parts = [(group.optimizer, state.inner_states[name].inner_state) for name, group in groups]
    return [
        (optimizer, state),
        *((each, each.state_of_base(inner)) for each, inner in parts),
    ]
