# SPDX-License-Identifier: Apache-2.0
"""Checks all parameters and optimizer slots for non-finite values after an update."""

from __future__ import annotations

import dataclasses

from trainer.step.context import StepContext
from trainer.step.health import UPDATED, Health, check_arrays
from trainer.step.state import TrainState


def check(state: TrainState, ctx: StepContext) -> Health:
    """Returns the health of a state after checking its parameters and slots."""
    assert state.health is not None
    replicated = ctx.facts is not None and ctx.facts.all_replicated
    return check_arrays(
        state.health, state.params, state.opt_state, state.step, replicated=replicated
    )


def check_update(new: TrainState, old: TrainState, ctx: StepContext) -> TrainState:
    """Returns the new state with its health; if `ctx.undoes`, a bad update is undone.

    Args:
        new: the state after the update.
        old: the state before the update.
        ctx: the context of the step.
    """
    health = check(new, ctx)
    # Only on request: until here the old values have to stay in memory, beside the new ones.
    if ctx.undoes:
        new = new.revert_if(health.is_bad, old, UPDATED)
    return dataclasses.replace(new, health=health)
