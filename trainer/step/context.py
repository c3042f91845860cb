# SPDX-License-Identifier: Apache-2.0
"""The context of a step: the settings of the run, and facts about the structure of its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from trainer.config.durations import Periodic
from trainer.modules.functional import Functional
from trainer.step.optimizer import Optimizer
from trainer.step.state import TrainState
from trainer.tasks.runner import TaskRunner

Batch = Mapping[str, jax.Array]
# (state, batch, ctx) -> (state, metrics). The default step gets a `StepContext`, a custom one a
# `CustomStepContext`.
StepFunction = Callable[[TrainState, Batch, Any], tuple[TrainState, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateFacts:
    """Facts about the structure of a state, derived once before the step is traced.

    Attributes:
        tx: the complete optax transformation for these parameters.
        frozen: tree of bools: whether each parameter is frozen.
        replicated: tree of bools: whether every device has all of a parameter; None if unknown.
        all_replicated: whether every device has all of every parameter.
        handles_non_finite: whether the optimizer handles non-finite gradients by itself.
        scales_rates: whether the optimizer state contains factors of the learning rate.
        needs_extra_arguments: whether the optimizer takes more than the usual arguments: see
            `objective.arguments`.
    """

    tx: optax.GradientTransformationExtraArgs
    frozen: Any
    replicated: Any = None
    all_replicated: bool = False
    handles_non_finite: bool = False
    scales_rates: bool = False
    needs_extra_arguments: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepContext:
    """The parts of a step and its settings.

    Attributes:
        model: the model's functional interface.
        task: computes the loss of a batch.
        optimizer: turns gradients into updates.
        seed: the run's seed; for a member of an ensemble, the seed of that member.
        facts: facts about the state; None before there is a state.
        accumulate: number of micro-batches that a batch is split into to save memory; the update
            is the same.
        ema_decay: decay of the moving average of the parameters; None for no average.
        loss_scale: initial value of the dynamic loss scale; None for no scale.
        shards: number of devices that the examples of a batch are spread over.
        log: when rows are logged. If given, norms are computed for those steps only.
        last_step: the last step of the run, whose row is logged too.
        tracks_health: whether the state has a `health`, which flags labels out of range.
        stops: whether `health` also flags non-finite values, and any flag stops the updates.
        sweeps: whether each step checks all gradients, parameters and slots, and slots keep their
            values once updates have stopped. On a CPU this would cost a third of a small model's
            step. There a step checks its loss only; the trainer checks the rest from time to time,
            and before it evaluates or saves a state.
        undoes: whether an update whose results are not finite is undone. This keeps the old values
            in memory until the check.
    """

    model: Functional
    task: TaskRunner
    optimizer: Optimizer
    seed: int | jax.Array
    facts: StateFacts | None = None
    accumulate: int = 1
    ema_decay: float | None = None
    loss_scale: float | None = None
    shards: int = 1
    log: Periodic | None = None
    last_step: int = 0
    tracks_health: bool = False
    stops: bool = True
    sweeps: bool = False
    undoes: bool = False
