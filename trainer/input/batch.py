# SPDX-License-Identifier: Apache-2.0
"""A batch on its way to a step, with everything that is known about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.parallel.mesh import ProcessRows


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LoadedBatch:
    """The batch of one step, or those of several steps stacked, for one call of a program.

    Attributes:
        start: position of the (first) step: its number, from 0.
        count: number of steps.
        arrays: the fields that are sent to the devices: (rows, ...), or (count, rows, ...) if
            `count` is more than 1.
        ids: int64 (count, rows), the example in each row that this process reads; -1 is padding.
        rows: which rows of the global batch these are; None for all.
        state: where a stream stands after the (last) step; None for other data.
        host: the fields that were asked for on the host, as the loader has them and with the
            dimensions of `arrays`.
        wait_secs: time that the loop waited for this batch.
    """

    start: int
    count: int
    arrays: dict[str, Any]
    ids: np.ndarray
    rows: ProcessRows | None = None
    state: Any = None
    host: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    wait_secs: float = 0.0
