# SPDX-License-Identifier: Apache-2.0
"""The learning rates of an update: schedules times factors in the optimizer state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax import contrib

from trainer.step.optimizer import Optimizer

# State types of transformations that scale the update by a number in their state, with its name.
_FACTORS: dict[type, str] = {
    contrib.ReduceLROnPlateauState: 'scale',
    optax.ScaleByBacktrackingLinesearchState: 'learning_rate',
    optax.ScaleByZoomLinesearchState: 'learning_rate',
}


def learning_rates(optimizer: Optimizer, opt_state: Any, count: Any) -> dict[str, Any]:
    """Returns the learning rates as an entry of a row; empty if they are unknown.

    Args:
        optimizer: the optimizer of the run.
        opt_state: its state after the update.
        count: number of updates before that update.
    """
    rates = _rates(optimizer, opt_state, count)
    return {} if rates is None else {'learning_rate': rates}


def _rates(optimizer: Optimizer, opt_state: Any, count: Any) -> Any:
    """Returns the learning rate, several by name, or None."""
    state = optimizer.state_of_base(opt_state)
    if optimizer.groups:
        known: dict[str, Any] = {}
        for name, group in optimizer.groups.items():
            inner = state.inner_states[name].inner_state
            rates = _rates(group.optimizer, inner, count)
            if isinstance(rates, Mapping):
                known.update({f'{name}/{part}': rate for part, rate in rates.items()})
            elif rates is not None:
                known[name] = rates
        return known or None
    schedules, scales = optimizer.learning_rate, factors(state)
    if isinstance(schedules, Mapping):
        # It is unknown which of the rates a factor belongs to. No rate is better than a wrong one.
        return None if scales else {name: each(count) for name, each in schedules.items()}
    if schedules is None:
        return None
    return math.prod(scales, start=schedules(count)) if scales else schedules(count)


def factors(state: Any) -> list[Any]:
    """Returns the numbers in an optimizer's state that scale its updates."""
    kinds = tuple(_FACTORS)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    return [getattr(node, _FACTORS[type(node)]) for node in nodes if isinstance(node, kinds)]
