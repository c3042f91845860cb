# SPDX-License-Identifier: Apache-2.0
"""A batch for a training step, with its example ids and other host data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.parallel.mesh import LocalExamples


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LoadedBatch:
    """The batch of one step, or the stacked batches of several steps, for one call of a program.

    Attributes:
        start: index of the (first) step, from 0.
        count: number of steps.
        arrays: the fields on the devices: (rows, ...), or (count, rows, ...) if `count` is more
            than 1.
        ids: int64 (count, rows), the example in each row that this process reads; -1 is padding.
        rows: which rows of the global batch this process reads; None for all.
        state: state of a stream after the (last) step; None for other data.
        host: the requested host fields, in the dtypes of the loader and with the leading dimensions
            of `arrays`.
        wait_secs: time that the training loop waited for this batch.
    """

    start: int
    count: int
    arrays: dict[str, Any]
    ids: np.ndarray
    rows: LocalExamples | None = None
    state: Any = None
    host: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    wait_secs: float = 0.0
