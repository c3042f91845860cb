# SPDX-License-Identifier: Apache-2.0
"""The counter of early stopping, which ends a run whose metric no longer improves.

`flax.training.early_stopping` counts the same way, but its state is not saved in checkpoints, and
if its first value is NaN, no later value is ever better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.builders.early_stopping import EarlyStopping
from trainer.config.errors import UserError


class Patience:
    """Counts the evaluations of a run without an improvement.

    Attributes:
        rule: decides whether a value is an improvement, and how many may fail to be one.
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
        """Returns the message on why the run ends."""
        rule = self.rule
        if self.best is None:
            return f'Stopped early: {rule.metric} has been NaN at every evaluation'
        times = '1 evaluation' if self.count == 1 else f'{self.count} evaluations'
        # Without the margin, a better value within it would make the message look wrong.
        margin = f' by {rule.min_delta:g}' if rule.min_delta else ''
        return (
            f'Stopped early: {rule.metric} has not improved on {self.best:.6g}{margin} for {times} '
            f'(mode {rule.mode!r}, patience {rule.patience})'
        )

    def update(self, evaluation: str, metrics: Mapping[str, float]) -> None:
        """Counts an evaluation; only the rule's metric matters.

        Raises:
            UserError: if the evaluation has no such metric.
        """
        # At most two splits: the key itself may contain '/', as in 'members/loss'.
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
            # Before the increment: `patience` evaluations may fail to improve, and the next one
            # stops. `stopped` stays set, since a later improvement (at the final evaluation) does
            # not undo the stop.
            self.stopped = self.stopped or self.count >= self.rule.patience
            self.count += 1

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, as JSON values."""
        return {'best': self.best, 'count': self.count, 'stopped': self.stopped}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Sets what `state` returned; None resets the counter."""
        state = state or {'best': None, 'count': 0, 'stopped': False}
        self.best, self.count, self.stopped = state['best'], state['count'], state['stopped']
