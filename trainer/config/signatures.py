# SPDX-License-Identifier: Apache-2.0
"""Determines the arguments of a callable."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from trainer.config import forwarded


def arguments(target: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """Returns the parameters that a target takes by name, and whether it takes any other names.

    If the signature ends in **kwargs, the parameters of the function that the target wraps are
    included (`functools.partial`, `__wrapped__`), and those of the functions that it visibly passes
    its **kwargs to.

    Returns:
        The parameters by name, and whether the names of others cannot be checked.
    """
    return _arguments(target, ())


def _arguments(target: Any, callers: tuple[Any, ...]) -> tuple[dict[str, inspect.Parameter], bool]:
    # `signature` would return the parameters of the wrapped function only, without those that the
    # wrapper adds. They are merged below.
    follow = not inspect.isfunction(target)
    try:
        parameters = dict(inspect.signature(target, follow_wrapped=follow).parameters)
    except (TypeError, ValueError):
        return {}, True
    open_ended = _pop_kind(parameters, inspect.Parameter.VAR_KEYWORD)
    _pop_kind(parameters, inspect.Parameter.VAR_POSITIONAL)
    inner = getattr(target, '__wrapped__', None) or getattr(target, 'func', None)
    if inspect.isclass(target) and type(target).__call__ is not type.__call__:
        # The metaclass of NNX modules, and others, hide the signature of the constructor; `None`
        # takes the place of `self`.
        inner = functools.partial(target.__init__, None)
    if open_ended and inner is not None:
        more, open_ended = _arguments(inner, callers)
        parameters = {**more, **parameters}
    if open_ended and (inner is None or inspect.isclass(target)):
        more, open_ended = _forwarded_arguments(target, callers)
        parameters = {**more, **parameters}
    return parameters, open_ended


def _forwarded_arguments(
    target: Any, callers: tuple[Any, ...]
) -> tuple[dict[str, inspect.Parameter], bool]:
    """Returns what the **kwargs of a target may contain, as far as its source shows that.

    None of these is required: the target may have set it before it passes them on.
    """
    forwarding = forwarded.find(target)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = {name: inspect.Parameter(name, keyword, default=None) for name in forwarding.names}
    open_ended = not forwarding.is_complete
    for callee in forwarding.callees:
        if callee.target in callers or callee.target is target:
            open_ended = True
            continue
        more, is_open = _arguments(callee.target, (*callers, target))
        open_ended = open_ended or is_open
        positional = [name for name, p in more.items() if p.kind is not keyword]
        given = callee.given.union(positional[: callee.num_positional])
        for name, parameter in more.items():
            if name not in given:
                default = None if parameter.default is parameter.empty else parameter.default
                parameters[name] = parameter.replace(kind=keyword, default=default)
    return parameters, open_ended


def _pop_kind(parameters: dict[str, inspect.Parameter], kind: Any) -> bool:
    """Removes the parameters of a kind, and returns whether there were any."""
    names = [name for name, p in parameters.items() if p.kind is kind]
    for name in names:
        del parameters[name]
    return bool(names)
