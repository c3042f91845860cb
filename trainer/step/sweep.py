# SPDX-License-Identifier: Apache-2.0
"""The check of all parameters and slots for values that are not finite, after an update."""

from __future__ import annotations

import dataclasses

from trainer.step.context import StepContext
from trainer.step.health import UPDATED, Health, check_arrays
from trainer.step.state import TrainState


def check(state: TrainState, ctx: StepContext) -> Health:
    """Returns the health of a state after looking at its parameters and slots."""
    assert state.health is not None
    whole = ctx.facts is not None and ctx.facts.all_whole
    return check_arrays(state.health, state.params, state.opt_state, state.step, whole=whole)


def check_update(new: TrainState, old: TrainState, ctx: StepContext) -> TrainState:
    """Returns the new state with its health, or with the old values if `undoes` says so.

    Args:
        new: after the update.
        old: before it.
        ctx: of the step.
    """
    health = check(new, ctx)
    if ctx.undoes:
        new = new.keeping(health.is_bad, old, UPDATED)
    return dataclasses.replace(new, health=health)
