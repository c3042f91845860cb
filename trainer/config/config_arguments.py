# SPDX-License-Identifier: Apache-2.0
"""Finds the arguments that `get_config(arg)` accepts, by reading its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from trainer.config import suggest
from trainer.config.errors import and_more, short_repr, shorten

# Largest number of arguments that a message lists.
_MAX_NAMES = 20


def known_arguments(get_config: Callable[..., Any]) -> list[str]:
    """Returns the arguments that a function accepts, as far as its source shows them.

    They are found in its annotation (`Literal['small', 'big']`), comparisons (`arg == 'small'`,
    `arg in SIZES`), dicts (`SIZES[arg]`) and `match` statements.
    """
    parameter = next(iter(inspect.signature(get_config).parameters), None)
    if parameter is None:
        return []
    try:
        hint = typing.get_type_hints(get_config).get(parameter)
        tree = ast.parse(textwrap.dedent(inspect.getsource(get_config)))
    # The user's annotations and source may be anything, and the result only improves a message.
    except Exception:
        return []
    if typing.get_origin(hint) is Literal:
        return _texts(typing.get_args(hint))
    scope = _Scope(parameter, tree, getattr(get_config, '__globals__', {}))
    return list(dict.fromkeys(text for node in ast.walk(tree) for text in scope.texts_in(node)))


def describe(arg: str, names: list[str]) -> str:
    """Returns " It knows 'small', 'big'. Did you mean 'big'?", or '' if `names` does not help."""
    # A function that fails with an argument it knows has another problem.
    if not names or arg in names:
        return ''
    nearest = suggest.nearest_name(arg, names)
    known = shorten(and_more([short_repr(name) for name in names], _MAX_NAMES), 300)
    return f' It knows {known}.' + (f' Did you mean {nearest!r}?' if nearest else '')


class _Scope:
    """The names in the source of a function, to find the texts that it compares a parameter with.

    Args:
        parameter: name of the parameter.
        tree: the parsed source.
        names: global names of the function's module, with their values.
    """

    def __init__(self, parameter: str, tree: ast.AST, names: Mapping[str, Any]):
        self._names = {parameter}
        self._values = dict(names)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                if self._is_argument(node.value):  # size = arg or 'small'
                    self._names.add(node.targets[0].id)
                self._values[node.targets[0].id] = self._value(node.value)

    def texts_in(self, node: ast.AST) -> Iterator[str]:
        """Yields the texts that one node compares the parameter with."""
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            sides = (node.left, node.comparators[0])
            if isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
                for one, other in (sides, sides[::-1]):  # Also 'small' == arg.
                    if self._is_argument(one):
                        yield from _texts([self._value(other)])
            elif isinstance(node.ops[0], (ast.In, ast.NotIn)) and self._is_argument(sides[0]):
                yield from _texts(self._value(sides[1]))
        elif isinstance(node, ast.Subscript) and self._is_argument(node.slice):
            yield from _texts(self._value(node.value))
        elif isinstance(node, ast.Match) and self._is_argument(node.subject):
            for case in node.cases:
                yield from _texts(self._value(each) for each in _pattern_values(case.pattern))

    def _is_argument(self, node: ast.AST) -> bool:
        """Whether a node is the argument: `arg`, `arg.lower()` or `arg or 'small'`."""
        if isinstance(node, ast.BoolOp):
            return self._is_argument(node.values[0])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args:
            return self._is_argument(node.func.value)
        return isinstance(node, ast.Name) and node.id in self._names

    def _value(self, node: ast.AST) -> Any:
        """Returns the value of a node, of a dict its keys; None if the source does not show it."""
        if isinstance(node, ast.Name):
            return self._values.get(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.keywords:
            return [each.arg for each in node.keywords]  # dict(small=..., big=...)
        if isinstance(node, ast.Dict):
            return [self._value(key) for key in node.keys if key is not None]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return self._value(node.func.value)  # SIZES.keys()
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return [self._value(each) for each in node.elts]
        return node.value if isinstance(node, ast.Constant) else None


def _pattern_values(pattern: ast.AST) -> Iterator[ast.AST]:
    return (node.value for node in ast.walk(pattern) if isinstance(node, ast.MatchValue))


def _texts(values: Any) -> list[str]:
    """Returns the strings among some values, or among the keys of a dict."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        return []
    return [value for value in values if isinstance(value, str)]
