# SPDX-License-Identifier: Apache-2.0
"""The result of `Trainer.fit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer.step import donated
from trainer.step.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a call of `fit`.

    Attributes:
        status: 'finished', 'stopped_early' (`config.early_stopping`), 'preempted' (SIGTERM),
            'interrupted' (Ctrl-C, or the stop button of a notebook) or 'paused' (`max_steps`).
        step: number of completed updates.
        metrics: the newest value of each metric, by flat name ('eval/test/accuracy').
        state: the state at `step`; deleted once another call of `fit` has donated it to a step.
    """

    status: str
    step: int
    metrics: Mapping[str, float]
    # Neither printed nor compared: both would copy its arrays from the devices.
    state: TrainState = dataclasses.field(repr=False, compare=False)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == 'state':
            donated.check(value, 'result.state')
        return value
