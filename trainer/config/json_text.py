# SPDX-License-Identifier: Apache-2.0
"""Parses JSON from files that may be damaged: returns a usable value or raises ValueError."""

from __future__ import annotations

import json
from typing import Any

# Far more than configs and metadata need, and far below Python's recursion limit, so that code
# that walks the value recursively is safe.
_MAX_LEVELS = 250
_TOO_DEEP = f'more than {_MAX_LEVELS} levels of nesting'


def parse(data: bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: for bytes that are not UTF-8, invalid JSON, a string that UTF-8 cannot encode
            (half of a surrogate pair), or too many levels of nesting.
    """
    try:
        value = json.loads(data.decode())
        # An escape such as \ud800 is half a character; printing it would fail, much later.
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Level by level rather than recursively: the depth that Python's stack allows depends on the
    # caller, and the limit must not.
    level, levels = [value], 0
    while level:
        levels += 1
        if levels > _MAX_LEVELS:
            raise ValueError(_TOO_DEEP)
        level = [inner for each in level for inner in _nested_containers(each)]
    return value


def _nested_containers(value: Any) -> list[Any]:
    """Returns the objects and lists directly inside a value."""
    inner = list(value.values()) if isinstance(value, dict) else value
    return [x for x in inner if isinstance(x, dict | list)] if isinstance(inner, list) else []


def is_int(value: Any) -> bool:
    """Whether a value is an integer in JSON; `true` is not, although Python's True is an int."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number that fits a Python float."""
    if isinstance(value, float):
        return True
    # The largest float is about 2**1024; a larger integer would raise OverflowError when converted.
    return is_int(value) and abs(value) < 2**1000


def type_name(value: Any) -> str:
    """Returns JSON's name for the type of a value, with an article: 'a list'."""
    names = {dict: 'an object', list: 'a list', str: 'a string', bool: 'a boolean'}
    return 'null' if value is None else names.get(type(value), 'a number')
