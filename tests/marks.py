# SPDX-License-Identifier: Apache-2.0
"""Marks of parametrized tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(quick: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Returns the values as parameters, all of them slow but the quick ones.

    Args:
        quick: what the quick tests run; each is among the values.
        values: of one parameter, or tuples of several.
    """
    quick, values = list(quick), list(values)
    missing = [value for value in quick if value not in values]
    assert not missing, f'{missing} not in {values}'
    return [value if value in quick else _slow(value) for value in values]


def slow_after(count: int, values: Iterable[Any]) -> list[Any]:
    """Returns the values as parameters, of which the first `count` are quick and the rest slow."""
    values = list(values)
    return [*values[:count], *map(_slow, values[count:])]


def _slow(value: Any) -> Any:
    if hasattr(value, 'marks'):
        return pytest.param(*value.values, marks=[*value.marks, pytest.mark.slow], id=value.id)
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)
