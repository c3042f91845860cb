# SPDX-License-Identifier: Apache-2.0
"""When to try again what has failed, such as writing to a disk that is full."""

from __future__ import annotations

import time

_FIRST_SECS, _LONGEST_SECS = 1.0, 60.0


class Retry:
    """Waits longer after each failure, up to a minute.

    Attributes:
        failed: whether the last attempt has failed.
    """

    def __init__(self) -> None:
        """Nothing has failed yet."""
        self.failed = False
        self._wait = _FIRST_SECS
        self._due = 0.0

    def is_due(self) -> bool:
        """Whether to try now."""
        return time.monotonic() >= self._due

    def count_failure(self) -> bool:
        """Records a failure; returns whether it is the first since a success."""
        first, self.failed = not self.failed, True
        self._due = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, _LONGEST_SECS)
        return first

    def count_success(self) -> bool:
        """Records a success; returns whether it follows a failure."""
        again, self.failed = self.failed, False
        self._wait, self._due = _FIRST_SECS, 0.0
        return again
