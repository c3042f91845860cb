# SPDX-License-Identifier: Apache-2.0
"""The arguments of a callable."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def arguments(target: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """Returns the parameters that a target takes by name, and whether it takes any other too.

    A signature that ends in **kwargs is looked through: `functools.partial` and `__wrapped__` lead
    to what is called in the end.
    """
    # A function that wraps another has parameters of its own; those of the other come below.
    follow = not inspect.isfunction(target)
    try:
        parameters = dict(inspect.signature(target, follow_wrapped=follow).parameters)
    except (TypeError, ValueError):
        return {}, True
    open_ended = _pop_kind(parameters, inspect.Parameter.VAR_KEYWORD)
    _pop_kind(parameters, inspect.Parameter.VAR_POSITIONAL)
    inner = getattr(target, '__wrapped__', None) or getattr(target, 'func', None)
    if inspect.isclass(target) and type(target).__call__ is not type.__call__:
        # What NNX and others do around the constructor has no signature of its own.
        inner = functools.partial(target.__init__, None)
    if open_ended and inner is not None:
        more, open_ended = arguments(inner)
        parameters = {**more, **parameters}
    return parameters, open_ended


def _pop_kind(parameters: dict[str, inspect.Parameter], kind: Any) -> bool:
    names = [name for name, p in parameters.items() if p.kind is kind]
    for name in names:
        del parameters[name]
    return bool(names)
