# SPDX-License-Identifier: Apache-2.0
"""Retention: which checkpoints to keep, and which one is the best.

The preservation policies of Orbax (as of 0.12.8) do not fit. `EveryNSteps` takes whole numbers of
steps, but an epoch need not be one. `BestN` ranks the metrics that are passed to Orbax at the save,
while ours may be added later (`Checkpoints.amend`); it keeps a checkpoint even if none was
evaluated at its own step, and the order of NaN is undefined. So `Policy` passes our own rule to
Orbax, which then deletes all other checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trainer.config.durations import Periodic


def better_mode(name: str) -> str | None:
    """Returns 'min' or 'max', judging by the name of a metric; None if it does not show it."""
    if name.endswith(('loss', 'error', 'perplexity')):
        return 'min'
    return 'max' if name.endswith('accuracy') else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """Decides which checkpoints to keep; the newest is always kept.

    Attributes:
        keep_last: number of newest checkpoints to keep.
        keep_every: period of further checkpoints to keep, or None.
        best_metric: flat name of the metric ('eval/test/accuracy') whose best step is kept too.
        best_mode: 'max' or 'min'.
    """

    keep_last: int = 2
    keep_every: Periodic | None = None
    best_metric: str | None = None
    best_mode: str = 'max'

    def score(self, meta: Mapping[str, Any]) -> float:
        """Returns a score: higher for a better checkpoint, -inf for one that cannot be the best.

        Args:
            meta: the metadata of the checkpoint.
        """
        metric = self.best_metric or ''
        # `metrics` are the latest values. Without an evaluation at this very step they belong to
        # other weights.
        measured = metric.split('/')[1:2] and metric.split('/')[1] in meta.get('evaluated', ())
        value = meta.get('metrics', {}).get(metric, math.nan) if measured else math.nan
        if value is None or math.isnan(value):
            return -math.inf
        return value if self.best_mode == 'max' else -value

    def best(self, steps: Iterable[int], score: Callable[[int], float]) -> int | None:
        """Returns the step with the highest score, the newest if several; None if none has one."""
        scored = [(score(step), step) for step in steps]
        return max((pair for pair in scored if pair[0] > -math.inf), default=(0, None))[1]

    def steps_to_keep(self, steps: Iterable[int], score: Callable[[int], float]) -> set[int]:
        """Returns the steps to keep.

        Args:
            steps: all steps with a checkpoint.
            score: returns the `score` of a step.
        """
        ordered = sorted(steps)
        kept = set(ordered[-max(1, self.keep_last) :])
        if self.keep_every is not None:
            kept.update(step for step in ordered if self.keep_every.is_due(step))
        best = None if self.best_metric is None else self.best(ordered, score)
        return kept if best is None else kept | {best}


@dataclasses.dataclass(frozen=True)
class Policy:
    """Retention as a preservation policy of Orbax."""

    retention: Retention
    score: Callable[[int], float]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether to keep it."""
        kept = self.retention.steps_to_keep((info.step for info in checkpoints), self.score)
        return [info.step in kept for info in checkpoints]
