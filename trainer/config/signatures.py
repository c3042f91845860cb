# SPDX-License-Identifier: Apache-2.0
"""Determines the arguments of a callable."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def arguments(target: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """Returns the parameters that a target takes by name, and whether it takes any other names.

    If the signature ends in **kwargs, the parameters of the function that the target wraps are
    included (`functools.partial`, `__wrapped__`).

    Returns:
        The parameters by name, and whether the names of others cannot be checked.
    """
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
        more, open_ended = arguments(inner)
        parameters = {**more, **parameters}
    return parameters, open_ended


def _pop_kind(parameters: dict[str, inspect.Parameter], kind: Any) -> bool:
    """Removes the parameters of a kind, and returns whether there were any."""
    names = [name for name, p in parameters.items() if p.kind is kind]
    for name in names:
        del parameters[name]
    return bool(names)
