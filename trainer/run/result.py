# SPDX-License-Identifier: Apache-2.0
"""The result of `Trainer.fit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer.observe.history import Column
from trainer.step import donated
from trainer.step.state import TrainState

_MOST_LINES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a call of `fit`.

    Attributes:
        status: 'finished', 'stopped_early' (`config.early_stopping`), 'preempted' (SIGTERM),
            'interrupted' (Ctrl-C, or the stop button of a notebook) or 'paused' (`max_steps`).
        step: number of completed updates.
        metrics: the newest value of each metric, by flat name ('eval/test/accuracy').
        history: the steps and values of each metric over the whole run, by the same names.
        state: the state at `step`; deleted once another call of `fit` has donated it to a step.
    """

    status: str
    step: int
    metrics: Mapping[str, float]
    history: Mapping[str, Column] = dataclasses.field(repr=False, compare=False)
    # Neither printed nor compared: both would copy its arrays from the devices.
    state: TrainState = dataclasses.field(repr=False, compare=False)

    def __repr__(self) -> str:
        """Returns the status and the newest evaluations, a line each."""
        lines = [f'Result(status={self.status!r}, step={self.step:,})']
        kinds: dict[str, list[str]] = {}
        for name, value in self.metrics.items():
            kind, _, metric = name.rpartition('/')
            is_shown = metric in ('loss', 'accuracy') or kind.startswith('eval/')
            if is_shown and '/member_' not in name:
                kinds.setdefault(kind, []).append(f'{metric} {value:.5g}')
        lines += [f'  {kind}: {", ".join(values[:6])}' for kind, values in kinds.items()]
        return '\n'.join(lines[:_MOST_LINES])

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == 'state':
            donated.check(value, 'result.state')
        return value
