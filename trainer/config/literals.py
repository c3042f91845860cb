# SPDX-License-Identifier: Apache-2.0
"""Parses literals of the command line, and checks that a config may contain them."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.config import advice, schema
from trainer.config.errors import UserError, short_repr, shorten

# Deeper than any real config, and far from where recursive code would overflow the stack.
MAX_DEPTH = 50
_MAX_NAME = 200

# Python has no literals for these, and writes them as names: `repr((math.inf,))` is '(inf,)'.
_NUMBERS = {'inf': math.inf, 'Infinity': math.inf, 'nan': math.nan, 'NaN': math.nan}


def literal(text: str) -> Any:
    """Returns the value of a JSON or Python literal; any other text unchanged.

    `inf` and `nan` are numbers, also within a tuple, list or dict.
    """
    # JSON first, for `true` and `null`.
    for parse in (json.loads, _parse_python):
        try:
            return parse(text)
        # Python's parser raises the last two for a text that is nested too deeply.
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text


def _parse_python(text: str) -> Any:
    tree = ast.parse(text.lstrip(' \t'), mode='eval')
    return ast.literal_eval(_NamedNumbers().visit(tree))


class _NamedNumbers(ast.NodeTransformer):
    """Replaces the names `inf` and `nan` by numbers."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in _NUMBERS:
            return node
        return ast.copy_location(ast.Constant(_NUMBERS[node.id]), node)


def to_text(value: Any) -> str:
    """Returns a value as its text on the command line."""
    return value if isinstance(value, str) else short_repr(value, limit=100_000)


def check_depth(value: Any, path: str) -> None:
    """Checks that the depth of a value is within the limit for a config.

    Raises:
        UserError: if it is nested too deeply.
    """
    # Level by level: recursion would fail on what this is to reject.
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for node in level for inner in _children(node)]
        if not level:
            return
    raise UserError(
        f'{path}: expected at most {MAX_DEPTH} levels of nesting, got {short_repr(value)}'
    )


def check(value: Any, path: str, keys: Sequence[str | int]) -> None:
    """Checks that a config may contain a value.

    Args:
        value: what a config key is set to.
        path: 'config.a.b', for messages.
        keys: the same path as keys.

    Raises:
        UserError: for an invalid key, an integer that is too large, or another type of value.
    """
    if isinstance(value, Mapping):
        check_names(value, path, keys)
        for key, inner in value.items():
            check(inner, f'{path}.{key}', [*keys, key])
    elif type(value) in (tuple, list):  # Not a named tuple, such as an optimizer.
        for index, inner in enumerate(value):
            check(inner, f'{path}[{index}]', [*keys, index])
    elif isinstance(value, int):
        # The range of int64 and uint64, the largest integers of an array.
        if not -(2**63) <= value < 2**64:
            raise UserError(f'{path}: {short_repr(value)} does not fit 64 bits')
    elif not (value is None or value is schema.REQUIRED or isinstance(value, (float, str))):
        raise UserError(
            f'{path}: expected a number, text, None, dict, tuple or list, got '
            f'{type(value).__name__} {short_repr(value)}; {advice.advice(value, path)}'
        )


def check_overflow(value: Any, text: str, path: str) -> None:
    """Checks that no number of a literal overflows.

    Raises:
        UserError: for a number such as 1e400, which Python parses as infinity.
    """
    # Each infinity that was meant is written as 'inf' or 'Infinity', and there must be no others.
    infinite = [where for where, number in _floats(value, path) if math.isinf(number)]
    if len(infinite) > text.lower().count('inf'):
        raise UserError(
            f'{infinite[0]}: {shorten(text)} is too large for a float (the largest is 1.8e308); '
            'for infinity write inf'
        )


def _floats(node: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _floats(value, f'{path}.{key}')
    elif isinstance(node, (tuple, list)):
        for index, value in enumerate(node):
            yield from _floats(value, f'{path}[{index}]')
    elif isinstance(node, float):
        yield path, node


def check_names(node: Mapping[Any, Any], path: str, keys: Sequence[str | int]) -> None:
    """Checks the keys of a dict: they must be names.

    An argument of a target may also be a dict with only numbers as keys, such as the boundaries
    of a schedule.

    Args:
        node: the dict whose keys are checked.
        path: 'config.a.b', for messages.
        keys: the same path as keys.

    Raises:
        UserError: for any other key.
    """
    numbers = [key for key in node if isinstance(key, (int, float)) and not isinstance(key, bool)]
    others = [key for key in node if not isinstance(key, str) and key not in numbers]
    # Fixed keys have a type; for arguments the type is None or object.
    hint = schema.type_at(keys)
    is_argument = hint is None or hint is object
    wrong = others or ([] if is_argument and len(numbers) == len(node) else numbers)
    if wrong:
        # ConfigDict sorts its keys, and a number cannot be compared with a name.
        mixed = ' among names' if is_argument and not others else ''
        raise UserError(
            f'{path}: expected names as the keys of a dict, as in {{"name": 1}}, got '
            f'{short_repr(wrong[0])}{mixed}'
        )
    for key in node:
        if isinstance(key, str):
            check_name(key, path)


def check_name(key: str, path: str) -> None:
    """Checks that a config may have a key.

    Raises:
        UserError: for an empty or very long key, and for one like '__class__'.
    """
    # The keys of a ConfigDict are attributes, and '__class__' has a meaning for Python.
    if not key or len(key) > _MAX_NAME or (key.startswith('__') and key.endswith('__')):
        raise UserError(f'{path}: {short_repr(key)} cannot be the name of a key')


def _children(node: Any) -> Sequence[Any]:
    if isinstance(node, Mapping):
        return list(node.values())
    return node if isinstance(node, (tuple, list)) else ()
