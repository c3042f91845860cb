# SPDX-License-Identifier: Apache-2.0
"""Parses JSON of files that may be damaged: returns a usable value or raises ValueError."""

from __future__ import annotations

import json
from typing import Any

# Far more than configs and metadata need, and far less than Python's own limit of recursion.
_MOST_LEVELS = 250
_TOO_DEEP = f'more than {_MOST_LEVELS} levels of nesting'


def parse(data: bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: if it is none: bytes that are not UTF-8, text that cannot be written as such
            (half of a surrogate pair), or too many levels of nesting.
    """
    try:
        value = json.loads(data.decode())
        # An escape may be half a character, and printing it would fail later.
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level, levels = [value], 0
    while level:
        levels += 1
        if levels > _MOST_LEVELS:
            raise ValueError(_TOO_DEEP)
        level = [inner for each in level for inner in _nested_containers(each)]
    return value


def _nested_containers(value: Any) -> list[Any]:
    """Returns the objects and lists directly inside a value."""
    inner = list(value.values()) if isinstance(value, dict) else value
    return [x for x in inner if isinstance(x, dict | list)] if isinstance(inner, list) else []


def is_int(value: Any) -> bool:
    """Whether it is a whole number; JSON's true is none, although Python's is."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a number that is a float of Python's."""
    if isinstance(value, float):
        return True
    return is_int(value) and abs(value) < 2**1000


def type_name(value: Any) -> str:
    """Returns what JSON calls the kind of a value: 'a list'."""
    kinds = {dict: 'an object', list: 'a list', str: 'a string', bool: 'a boolean'}
    return 'null' if value is None else kinds.get(type(value), 'a number')
