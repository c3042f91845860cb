# SPDX-License-Identifier: Apache-2.0
"""Finds the record that cannot be read among many that were requested at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np


def describe(source: Any, index: int) -> str:
    """Returns the name of an example for messages, from `source.describe(index)` if it exists."""
    own = getattr(source, 'describe', None)
    return own(index) if own else f'example {index} of the source {type(source).__name__}'


def blame(source: Any, ids: np.ndarray, read: Callable[[slice], Any]) -> str:
    """Returns a note that names the example at which `read` fails.

    Args:
        source: source of the examples.
        ids: int64 (n,), the examples in the order in which they were read.
        read: reads the given slice of `ids`, and raises if it fails.
    """
    # Only after an error, so reading again costs nothing in a run without one.
    index = _find_first_failing(read, len(ids))
    if index is not None:
        return f'while reading {describe(source, int(ids[index]))}'
    some = ', '.join(map(str, ids[:8].tolist())) + (', ...' if len(ids) > 8 else '')
    return f'while reading the examples {some} together; each can be read on its own'


def raise_with_note(error: Exception, note: str) -> NoReturn:
    """Raises an error again, with a note that says what was read.

    A `StopIteration` becomes an `EOFError`: in an iterator it would end the data without a word, or
    be called an error of a generator.
    """
    if isinstance(error, StopIteration):
        raise EOFError(f'the source has ended before the number of its examples, {note}') from error
    # A note, so that the error keeps its type and its traceback.
    error.add_note(note)
    raise error


def _find_first_failing(read: Callable[[slice], Any], rows: int) -> int | None:
    """Bisects the rows, so that about as many rows are read again as the batch has."""

    def fails(low: int, high: int) -> bool:
        try:
            read(slice(low, high))
        except Exception:
            return True
        return False

    # The invariant: the first failing row is in [low, high).
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        if fails(low, middle):
            high = middle
        else:
            low = middle
    # The search assumes that something fails: an error that does not occur again has no culprit.
    return low if rows and fails(low, high) else None
