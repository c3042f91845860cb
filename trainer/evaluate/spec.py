# SPDX-License-Identifier: Apache-2.0
"""One entry of `config.evals`, built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from trainer.config.durations import Duration
from trainer.evaluate.score import Score
from trainer.input.data import EvalData
from trainer.modules.functional import Functional
from trainer.tasks.runner import TaskRunner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One entry of `config.evals`.

    Attributes:
        every: when it runs.
        final: whether it also runs at the end of training.
        ema: whether it evaluates the moving average of the parameters.
        task: computes the metrics.
        batch_size: examples in a batch.
        data: returns the data of the split, in batches padded so that they divide evenly over the
            given number of shards; its second argument is a source to read instead, or None.
        model: the form of the model that it evaluates, with the same variables; None for that of
            training.
        score: computed on the host from the predictions for all examples, or None.
    """

    every: Duration
    final: bool
    ema: bool
    task: TaskRunner
    batch_size: int
    data: Callable[[int, Any], EvalData]
    model: Functional | None = None
    score: Score | None = None
