# SPDX-License-Identifier: Apache-2.0
"""Marks of parametrised tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(quick: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Returns the values as parameters; those that are not among the quick ones are slow.

    Args:
        quick: what the quick tests run; each is among the values.
        values: of one parameter, or tuples of several.
    """
    quick, values = list(quick), list(values)
    missing = [value for value in quick if value not in values]
    assert not missing, f'{missing} not in {values}'
    return [
        value if value in quick else pytest.param(*_several(value), marks=pytest.mark.slow)
        for value in values
    ]


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
