# SPDX-License-Identifier: Apache-2.0
"""Names the record that cannot be read, among many that were asked for at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def describe(source: Any, index: int) -> str:
    """Returns what a message calls an example; a source with `describe(index)` says it itself."""
    own = getattr(source, 'describe', None)
    return own(index) if own else f'example {index} of the source {type(source).__name__}'


def blame(source: Any, ids: np.ndarray, read: Callable[[slice], Any]) -> str:
    """Returns a sentence that names the example that `read` fails at.

    Args:
        source: where they come from.
        ids: int64 (n,), the examples in the order in which they were read.
        read: reads those at the given places, and raises again.
    """
    place = _first_failing(read, len(ids))
    if place is not None:
        return f'while reading {describe(source, int(ids[place]))}'
    some = ', '.join(map(str, ids[:8].tolist())) + (', ...' if len(ids) > 8 else '')
    return f'while reading the examples {some} together; each can be read alone'


def _first_failing(read: Callable[[slice], Any], rows: int) -> int | None:
    """Halves the rows until one is left, so that a large batch is read again only once in all."""

    def fails(low: int, high: int) -> bool:
        try:
            read(slice(low, high))
        except Exception:
            return True
        return False

    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        if fails(low, middle):
            high = middle
        else:
            low = middle
    return low if rows and fails(low, high) else None
