# SPDX-License-Identifier: Apache-2.0
"""What a step works with: the settings of the run, and what follows from the state's structure."""

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
# Of a state, a batch and a `StepContext`, or what a step of the user's gets instead.
StepFunction = Callable[[TrainState, Batch, Any], tuple[TrainState, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateFacts:
    """What follows from the structure of a state alone, found once before a step is traced.

    Attributes:
        tx: the complete transformation, for these parameters.
        frozen: for each parameter whether it is frozen.
        whole: for each parameter whether it is replicated on every device; None: unknown.
        all_whole: whether all of them are.
        handles_non_finite: whether the optimizer has a rule of its own for gradients that are not
            finite.
        scales_rates: whether the optimizer's state holds factors of its learning rate.
        asks_more: whether the optimizer takes other arguments than most: see `objective`.
    """

    tx: optax.GradientTransformationExtraArgs
    frozen: Any
    whole: Any = None
    all_whole: bool = False
    handles_non_finite: bool = False
    scales_rates: bool = False
    asks_more: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepContext:
    """The parts and the settings of a step.

    Attributes:
        model: the model's functional interface.
        task: what the model is asked to do with a batch.
        optimizer: what turns gradients into updates.
        seed: the run's seed; of a member of an ensemble, its own.
        facts: those of the state; None before there is one.
        accumulate: slices that a batch is split into, to save memory; the update is the same.
        ema_decay: decay of the moving average of the parameters, or None for no average.
        loss_scale: first value of the dynamic loss scale, or None for none.
        shards: number of devices that a batch's rows are spread over.
        log: when rows are logged; where that is known, norms are computed for those steps only.
        last_step: of the run; its row is logged too.
        watches: whether the state has a `health`, which notes labels out of range.
        stops: whether that also notes what is not finite, and updates stop at either.
        sweeps: whether each step checks all gradients, parameters and slots for that, and slots
            stay as they are once updates have stopped. On a CPU that would cost a third of a small
            model's step. There a step checks its loss, and the trainer checks the rest now and
            then, and before it evaluates or saves a state.
        undoes: whether a non-finite update is undone; the old values are kept until it is checked.
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
    watches: bool = False
    stops: bool = True
    sweeps: bool = False
    undoes: bool = False
