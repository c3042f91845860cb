# SPDX-License-Identifier: Apache-2.0
"""Ends a run whose metric no longer improves.

`flax.training.early_stopping` counts the same way, but keeps no state in a checkpoint, and a first
value that is NaN stays its best for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.build.early_stopping import EarlyStopping
from trainer.config.errors import UserError


class Patience:
    """Counts the evaluations of a run that are no improvement.

    Attributes:
        rule: when a value is an improvement, and how many may be none.
        best: the best value so far, None before the first.
        count: evaluations since the last improvement.
        stopped: whether the run has to end.
    """

    def __init__(self, rule: EarlyStopping):
        """Starts with no evaluation."""
        self.rule = rule
        self.best: float | None = None
        self.count = 0
        self.stopped = False

    def reason(self) -> str:
        """Returns why the run ends."""
        rule = self.rule
        if self.best is None:
            return f'early stopping: {rule.metric} was never a number'
        times = '1 evaluation' if self.count == 1 else f'{self.count} evaluations'
        return (
            f'early stopping: {rule.metric} has not improved on {self.best:.6g} for {times} '
            f'(mode {rule.mode!r}, patience {rule.patience})'
        )

    def update(self, evaluation: str, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of an evaluation; ignores all but the one that the rule names.

        Raises:
            UserError: if the evaluation has no such metric.
        """
        _, name, key = self.rule.metric.split('/', 2)
        if evaluation != name:
            return
        if key not in metrics:
            raise UserError(
                f'config.early_stopping.metric: evaluation {name!r} has no {key!r}; it has '
                + ', '.join(metrics)
            )
        value = float(metrics[key])
        if self.rule.is_better(value, self.best):
            self.best, self.count = value, 0
        else:
            self.stopped = self.stopped or self.count >= self.rule.patience
            self.count += 1

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, as JSON values."""
        return {'best': self.best, 'count': self.count, 'stopped': self.stopped}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continues from a `state`; None starts from no evaluation."""
        state = state or {'best': None, 'count': 0, 'stopped': False}
        self.best, self.count, self.stopped = state['best'], state['count'], state['stopped']
