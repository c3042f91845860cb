# SPDX-License-Identifier: Apache-2.0
"""Builds the length of a run, and settings of training, sharding and profiling."""

from __future__ import annotations

import dataclasses
from typing import Any

from trainer.config import targets
from trainer.config.checks import check_positive
from trainer.config.durations import Clock, Progress
from trainer.config.errors import UserError
from trainer.config.sections import Sections, WatchdogSection
from trainer.input.data import TrainData
from trainer.observe.profile import Window
from trainer.parallel.sharding import BUILT_IN, Rule
from trainer.tasks.runner import TaskRunner


def build_clock(sections: Sections, data: TrainData) -> tuple[Clock, int]:
    """Returns the clock that converts durations to steps, and the number of steps of the run.

    Raises:
        UserError: for a duration that cannot be converted, or too many steps.
    """
    clock = Clock(
        batch_size=sections.data.batch_size,
        steps_per_epoch=data.steps_per_epoch,
        progress=Progress(data.marks) if data.marks else None,
    )
    # Without `total_steps`: `train_for` cannot be a percentage of itself.
    total = clock.step_after(sections.train_for, path='config.train_for')
    # `TrainState.step` is int32.
    if total >= 2**31:
        raise UserError(f'config.train_for: {total:.3g} steps; the maximum is 2^31 - 1')
    return dataclasses.replace(clock, total_steps=total), total


def build_accumulate(sections: Sections, task: TaskRunner) -> int:
    """Returns the number of micro-batches per batch.

    Raises:
        UserError: if the examples of the task depend on each other.
    """
    # Such as a contrastive loss with in-batch negatives: micro-batches would have fewer of them.
    count = check_positive(sections.accumulate, 'config.accumulate')
    if count > 1 and not getattr(task.task, 'decomposable', True):
        raise UserError(
            f'config.accumulate: {type(task.task).__name__} cannot be computed in {count} '
            'micro-batches: its examples depend on each other (decomposable = False)'
        )
    return count


def build_watchdog(section: WatchdogSection) -> WatchdogSection:
    """Returns the limits for a run that hangs.

    Raises:
        UserError: if one is not positive.
    """
    for name, limit in dataclasses.asdict(section).items():
        if limit is not None and not limit > 0:
            raise UserError(
                f'config.watchdog.{name}: expected a positive number of seconds, or None for no '
                f'limit; got {limit}'
            )
    return section


def build_ema_decay(sections: Sections) -> float | None:
    """Returns the decay of the moving average of the parameters, or None if there is none.

    Raises:
        UserError: if it is not in [0, 1).
    """
    decay = sections.ema.decay if sections.ema else None
    if decay is not None and not 0 <= decay < 1:
        raise UserError(f'config.ema.decay: expected a number in [0, 1), got {decay}')
    return decay


def build_sharding(sections: Sections) -> tuple[Rule, ...]:
    """Returns the rules that shard parameters over the mesh, in order of precedence."""
    given, path = sections.sharding, 'config.sharding'
    if not isinstance(given, tuple):
        return (_rule(given, path),)
    return tuple(_rule(rule, f'{path}[{index}]') for index, rule in enumerate(given))


def build_profile(sections: Sections, clock: Clock) -> Window | None:
    """Returns the steps to profile, or None."""
    given = sections.profile
    if given is None:
        return None
    start = clock.step_after(given.start, path='config.profile.start')
    return Window(start, start + check_positive(given.steps, 'config.profile.steps'))


def _rule(given: Any, path: str) -> Rule:
    return BUILT_IN[given] if isinstance(given, str) else targets.instantiate(given, path)
