# SPDX-License-Identifier: Apache-2.0
"""The rule by which a metric that no longer improves ends a run."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Which metric must keep improving, and by how much.

    Attributes:
        metric: 'eval/<name>/<metric>'.
        mode: whether 'min' or 'max' is better.
        min_delta: smaller changes are no improvement.
        patience: evaluations in a row without an improvement that do not end the run; the next one
            does.
    """

    metric: str
    mode: str = 'min'
    min_delta: float = 0.0
    patience: int = 0

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value improves on the best so far, None before the first; NaN never does."""
        if math.isnan(value):
            return False
        if best is None:
            return True
        gain = best - value if self.mode == 'min' else value - best
        return gain > self.min_delta
