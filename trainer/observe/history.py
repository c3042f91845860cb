# SPDX-License-Identifier: Apache-2.0
"""The metrics of a run as columns: the steps and values of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath


class Column(NamedTuple):
    """One metric: `plt.plot(*column)`, or `pd.Series(column.values, index=column.steps)`.

    Attributes:
        steps: int64 (rows,), ascending.
        values: float64 (rows,).
    """

    steps: np.ndarray
    values: np.ndarray


class History:
    """The rows of a run, also of its earlier starts, in memory."""

    def __init__(self) -> None:
        """Starts without rows."""
        self._rows: list[tuple[int, dict[str, float]]] = []

    def add(self, step: int, row: Mapping[str, float]) -> None:
        """Adds a row of numbers by flat name."""
        self._rows.append((step, dict(row)))

    def truncate(self, step: int) -> None:
        """Removes the rows after a step."""
        self._rows = [row for row in self._rows if row[0] <= step]

    def read(self, path: epath.Path) -> None:
        """Replaces the rows by those of a `metrics.jsonl`; damaged lines are left out."""
        self._rows = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
                step = int(row.pop('step'))
            except (ValueError, KeyError, AttributeError, TypeError):
                continue
            # In the file, null is a value that is not finite.
            self.add(step, {name: np.nan if x is None else x for name, x in row.items()})

    def columns(self) -> dict[str, Column]:
        """Returns the column of each metric, by flat name, in the order of their first rows."""
        # By step: a row that was written twice, as after a resume, counts once.
        found: dict[str, dict[int, float]] = {}
        for step, row in self._rows:
            for name, value in row.items():
                found.setdefault(name, {})[step] = value
        return {
            name: Column(np.array(list(each), np.int64), np.array(list(each.values()), np.float64))
            for name, each in found.items()
        }
