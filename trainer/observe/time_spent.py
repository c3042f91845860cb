# SPDX-License-Identifier: Apache-2.0
"""The time spent in each part of a run."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator

from trainer.observe.progress import duration


class TimeSpent:
    """Seconds by part of the run."""

    def __init__(self) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()
        self._secs: dict[str, float] = collections.defaultdict(float)
        self._parts: list[str] = []

    @property
    def current(self) -> str:
        """The part that is measured now: 'steps' if it is none of the others."""
        # Copied: another thread may end the part between the two uses.
        parts = list(self._parts)
        return parts[-1] if parts else 'steps'

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds the time inside the block to a part."""
        began = time.perf_counter()
        self._parts.append(part)
        try:
            yield
        finally:
            self._parts.pop()
            self._secs[part] += time.perf_counter() - began

    def set(self, part: str, secs: float) -> None:
        """Sets the seconds of a part that is measured elsewhere."""
        self._secs[part] = secs

    def add(self, part: str, secs: float) -> None:
        """Adds to the seconds of a part that is measured elsewhere."""
        self._secs[part] += secs

    def move(self, source: str, to: str, secs: float) -> None:
        """Moves seconds from one part to another."""
        self._secs[source] -= secs
        self._secs[to] += secs

    def get(self, part: str) -> float:
        """Returns the seconds of a part."""
        return self._secs.get(part, 0.0)

    def total(self) -> float:
        """Returns the seconds since the start."""
        return time.perf_counter() - self._began

    def summary(self) -> str:
        """Returns 'total 1:02: compile 2.0 s, ...'."""
        parts = ', '.join(f'{name} {duration(secs)}' for name, secs in self._secs.items())
        return f'total {duration(self.total())}: {parts}'
