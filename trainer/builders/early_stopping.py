# SPDX-License-Identifier: Apache-2.0
"""Ends a run whose metric has stopped getting better."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from trainer.config.errors import UserError


@dataclasses.dataclass(kw_only=True)
class EarlyStopping:
    """Counts evaluations that are no improvement, as `flax.training.early_stopping` counts them.

    An improvement is better than the best value so far by more than `min_delta`. The first
    evaluations without one, `patience` of them in a row, are borne; the next one ends the run. NaN
    is never an improvement.

    Attributes:
        metric: 'eval/<name>/<metric>'.
        mode: whether 'min' or 'max' is better.
        min_delta: what is less is no improvement.
        patience: evaluations without an improvement that are borne.
        best: the best value so far, None before the first.
        count: evaluations since the last improvement.
        stopped: whether the run shall end.
    """

    metric: str
    mode: str = 'min'
    min_delta: float = 0.0
    patience: int = 0
    best: float | None = None
    count: int = 0
    stopped: bool = False

    def reason(self) -> str:
        """Returns why the run ends."""
        if self.best is None:
            return f'early stopping: {self.metric} was never a number'
        times = '1 evaluation' if self.count == 1 else f'{self.count} evaluations'
        return (
            f'early stopping: {self.metric} has not improved on {self.best:.6g} for {times} '
            f'(mode {self.mode!r}, patience {self.patience})'
        )

    def update(self, evaluation: str, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of an evaluation; of any other than the one it looks at, nothing.

        Raises:
            UserError: if the evaluation has no such metric.
        """
        _, name, key = self.metric.split('/', 2)
        if evaluation != name:
            return
        if key not in metrics:
            raise UserError(
                f'config.early_stopping.metric: evaluation {name!r} has no {key!r}; it has '
                + ', '.join(metrics)
            )
        value = float(metrics[key])
        if self._is_better(value):
            self.best, self.count = value, 0
        else:
            self.stopped = self.stopped or self.count >= self.patience
            self.count += 1

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, as JSON values."""
        return {'best': self.best, 'count': self.count, 'stopped': self.stopped}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from a `state`; None begins anew."""
        state = state or {'best': None, 'count': 0, 'stopped': False}
        self.best, self.count, self.stopped = state['best'], state['count'], state['stopped']

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.mode == 'min' else value - self.best
        return gain > self.min_delta
