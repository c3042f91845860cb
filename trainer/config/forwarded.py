# SPDX-License-Identifier: Apache-2.0
"""Finds out where a function passes its **kwargs on to, by reading its source."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

_Parents = dict[ast.AST, ast.AST]

# What a call of these does with the whole dict, or with one of its keys, hides no name from a call
# that gets it later: they show it or add to it.
_SHOWING = frozenset({'debug', 'info', 'log', 'print', 'repr', 'str', 'warning'})
_ADDING = frozenset({'setdefault', 'update'})


@dataclasses.dataclass(frozen=True)
class Callee:
    """A callable that a function passes its `**kwargs` to.

    Attributes:
        target: the class or function.
        given: the names that the call sets itself.
        num_positional: number of positional arguments of the call.
    """

    target: Any
    given: frozenset[str]
    num_positional: int


@dataclasses.dataclass(frozen=True)
class Forwarding:
    """The uses of `**kwargs` in a function.

    Attributes:
        names: names that the function itself takes from them, as `kwargs.pop('name')` does.
        callees: what it passes them to.
        is_complete: whether every use was understood. If not, other names may be valid too.
    """

    names: frozenset[str] = frozenset()
    callees: tuple[Callee, ...] = ()
    is_complete: bool = False


def find(target: Any) -> Forwarding:
    """Returns what a class, method or function does with its `**kwargs`; nothing is called."""
    owner, function = _function_of(target)
    uses = None if function is None else _read_uses(function)
    if function is None or uses is None:
        return Forwarding()
    callees = []
    for call in uses.calls:
        found = _find_callee(call.func, target, owner, function)
        if found is None or any(isinstance(value, ast.Starred) for value in call.args):
            continue
        given = frozenset(keyword.arg for keyword in call.keywords if keyword.arg is not None)
        callees.append(Callee(found, given, len(call.args)))
    is_complete = uses.is_complete and 0 < len(callees) == len(uses.calls)
    return Forwarding(uses.names, tuple(callees), is_complete)


@dataclasses.dataclass(frozen=True)
class _Uses:
    names: frozenset[str]
    calls: tuple[ast.Call, ...]
    is_complete: bool


def _function_of(target: Any) -> tuple[type | None, Callable[..., Any] | None]:
    """Returns the Python function that a call of the target runs, and the class that defines it."""
    owner = None
    function = getattr(target, '__func__', target)
    if inspect.isclass(target):
        owner = next(base for base in target.__mro__ if '__init__' in vars(base))
        function = vars(owner)['__init__']
    return owner, function if inspect.isfunction(function) else None


def _find_callee(
    node: ast.expr, target: Any, owner: type | None, function: Callable[..., Any]
) -> Any:
    """Returns the object that an expression in a function names, None if that is not certain."""
    match node:
        case ast.Name(id=name):
            code = function.__code__
            if name in code.co_varnames[:1]:
                return getattr(target, '__self__', None)  # `cls` of a class method.
            if name in code.co_varnames + code.co_cellvars:
                return None
            cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=False))
            if name in cells:
                return cells[name].cell_contents
            return function.__globals__.get(name, getattr(builtins, name, None))
        case ast.Attribute(value=ast.Call(func=ast.Name(id='super'), args=[]), attr='__init__'):
            # In a class of several bases, the next one is not that of the owner alone.
            rest = target.__mro__[target.__mro__.index(owner) :] if owner is not None else ()
            if owner is None or rest != owner.__mro__:
                return None
            return next(base for base in rest[1:] if '__init__' in vars(base))
        case ast.Attribute(value=value, attr=attribute):
            inner = _find_callee(value, target, owner, function)
            if inspect.ismodule(inner) or inspect.isclass(inner):
                return getattr(inner, attribute, None)
    return None


@functools.lru_cache
def _read_uses(function: Callable[..., Any]) -> _Uses | None:
    """Returns how the source of a function uses its `**kwargs`, None if it cannot be read."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(definition, ast.FunctionDef) or definition.args.kwarg is None:
        return None
    name = definition.args.kwarg.arg
    nodes = list(ast.walk(definition))
    parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    # A function inside may have an argument of the same name.
    is_complete = sum(isinstance(node, ast.arg) and node.arg == name for node in nodes) == 1
    names: set[str] = set()
    calls: list[ast.Call] = []
    for node in nodes:
        if not (isinstance(node, ast.Name) and node.id == name):
            continue
        call, taken = _call_with(node, parents), _name_taken(node, parents)
        if call is not None:
            calls.append(call)
        elif taken is not None:
            names.add(taken)
        elif not _is_harmless(node, parents):
            is_complete = False
    return _Uses(frozenset(names), tuple(calls), is_complete)


def _call_with(node: ast.AST, parents: _Parents) -> ast.Call | None:
    """Returns the call that gets `**kwargs`, also within a dict: `f(**{**defaults, **kwargs})`."""
    parent = parents[node]
    while isinstance(parent, ast.Dict):
        spread = [
            value for key, value in zip(parent.keys, parent.values, strict=True) if key is None
        ]
        if node not in spread:
            return None
        node, parent = parent, parents[parent]
    if isinstance(parent, ast.keyword) and parent.arg is None:
        call = parents[parent]
        return call if isinstance(call, ast.Call) else None
    return None


def _name_taken(node: ast.Name, parents: _Parents) -> str | None:
    """Returns 'x' for `kwargs.pop('x')`, `.get('x')`, `kwargs['x']` and `'x' in kwargs`."""
    key: ast.AST | None = None
    match parents[node]:
        case ast.Subscript(value=value, slice=index) if value is node:
            key = index
        case ast.Compare(left=left, comparators=[other]) if other is node:
            key = left
        case ast.Attribute(attr='pop' | 'get' | 'setdefault') as method:
            call = parents[method]
            key = call.args[0] if isinstance(call, ast.Call) and call.args else None
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def _is_harmless(node: ast.Name, parents: _Parents) -> bool:
    """Whether a use takes no name away: the dict is shown, or something is added to it."""
    parent = parents[node]
    if isinstance(parent, ast.FormattedValue):
        return True
    if isinstance(parent, ast.Attribute):
        return parent.attr in _ADDING
    function = parent.func if isinstance(parent, ast.Call) else None
    name = getattr(function, 'attr', getattr(function, 'id', None))
    return name in _SHOWING
