# SPDX-License-Identifier: Apache-2.0
"""The early stopping rule: ends a run when a metric no longer improves."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """The metric that must keep improving, and by how much.

    Attributes:
        metric: 'eval/<name>/<metric>'.
        mode: 'min' if smaller values are better, 'max' if larger ones are.
        min_delta: smallest change that counts as an improvement.
        patience: number of consecutive evaluations without improvement that are tolerated; the
            next one ends the run.
    """

    metric: str
    mode: str = 'min'
    min_delta: float = 0.0
    patience: int = 0

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value improves on the best so far; NaN never does.

        Args:
            value: value of the metric in the newest evaluation.
            best: the best value so far; None before the first evaluation.
        """
        # Before the first comparison: as the best value, NaN could never be improved on.
        if math.isnan(value):
            return False
        if best is None:
            return True
        gain = best - value if self.mode == 'min' else value - best
        # Strictly greater: with min_delta=0, an equal value is not an improvement.
        return gain > self.min_delta
