# SPDX-License-Identifier: Apache-2.0
"""How a Linen module is told whether it trains."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
from flax.core import FrozenDict

# How modules spell "am I training?", and the value that each spelling takes in training.
TRAIN_FLAGS = {
    'train': True,
    'training': True,
    'is_training': True,
    'deterministic': False,
    'use_running_average': False,
}

# The mode of the call that is running, for modules that are made in it.
current: contextvars.ContextVar[bool | None] = contextvars.ContextVar('training', default=None)


def set_fields(module: nn.Module, training: bool) -> nn.Module:
    """Returns the module with the mode in those of its fields that its maker left at the default.

    The modules among its fields, alone or in lists, tuples and dicts, get it too. What is also an
    argument of the module's call is left to the call.
    """
    # A module that stands in two places stays one module: its parameters are shared.
    told: dict[int, nn.Module] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, nn.Module):
            if id(value) not in told:
                told[id(value)] = replaced(value)
            return told[id(value)]
        if type(value) in (list, tuple):
            items = type(value)(visit(item) for item in value)
            return items if any(map(operator.is_not, items, value)) else value
        if type(value) in (dict, FrozenDict):
            named = {key: visit(item) for key, item in value.items()}
            return named if any(named[key] is not value[key] for key in named) else value
        return value

    def replaced(module: nn.Module) -> nn.Module:
        in_call = inspect.signature(type(module).__call__).parameters
        before = {name: getattr(module, name) for name in fields(module)}
        after: dict[str, Any] = {
            **{name: visit(value) for name, value in before.items()},
            **{
                name: value
                for name, value in _flags_in(before, training).items()
                if name not in in_call and _is_unset(module, name)
            },
        }
        changes = {name: value for name, value in after.items() if value is not before[name]}
        return dataclasses.replace(module, **changes) if changes else module

    return visit(module)


def method(steps: Sequence[Callable[[Any], Any]], training: bool) -> Callable[..., Any]:
    """Returns the function for `Module.apply` that tells the mode to what it calls: see `call`."""
    return functools.partial(call, steps, training)


def call(
    steps: Sequence[Callable[[Any], Any]],
    training: bool,
    module: nn.Module,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls a bound module, or what steps lead to from it, and tells it the mode.

    NNX modules within are told by `nnx_bridge.telling_nnx`, in whose context it is to be called.

    Args:
        steps: lead one after the other from the bound module to what is called: a method or a
            sub-module; none for the module's `__call__`.
        training: the mode.
        module: bound to its variables.
        *args: of what is called.
        **kwargs: likewise, by name.
    """
    target: Any = module
    for step in steps:
        target = step(target)
    args, kwargs = with_flags(target, args, kwargs, training)
    layers = isinstance(module, nn.Sequential)
    token = current.set(training)
    try:
        with telling_layers(training) if layers else contextlib.nullcontext():
            return target(*args, **kwargs)
    finally:
        current.reset(token)


def telling_layers(
    training: bool, top: nn.Sequential | None = None
) -> contextlib.AbstractContextManager[Any]:
    """Tells each layer of an `nn.Sequential`, which itself passes nothing on.

    Args:
        training: the mode.
        top: the `nn.Sequential`; None if it is the model.
    """

    def intercept(
        following: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        if context.method_name == '__call__' and is_layer(context.module, top):
            args, kwargs = with_flags(context.module, args, kwargs, training)
        return following(*args, **kwargs)

    return nn.intercept_methods(intercept)


def is_layer(module: nn.Module, top: nn.Sequential | None = None) -> bool:
    """Whether only `nn.Sequential`s stand between the module and the top, or the root."""
    if top is not None:
        # By identity: layers that a compact method has made have its module for a parent.
        within = [layer for layer in top.layers if isinstance(layer, nn.Module)]
        nested = [layer for layer in within if isinstance(layer, nn.Sequential)]
        return any(layer is module for layer in within) or any(is_layer(module, n) for n in nested)
    parent = module.parent
    while isinstance(parent, nn.Sequential):
        parent = parent.parent
        if not isinstance(parent, nn.Module):
            return True
    return False


def with_flags(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Adds the flags that the target takes and the caller did not give."""
    signature = inspect.signature(target.__call__ if isinstance(target, nn.Module) else target)
    try:
        given = signature.bind_partial(*args, **kwargs)
    except TypeError:
        return args, kwargs  # The call itself says best what is wrong.
    parameters = signature.parameters
    flags = {
        name: TRAIN_FLAGS[name] == training
        for name, parameter in parameters.items()
        if name in TRAIN_FLAGS
        and name not in given.arguments
        and not (parameter.default is None and _is_chosen(target, name))
    }
    if not flags:
        return args, kwargs
    given.arguments.update(flags)
    # By position as far as it goes: lifted modules know static arguments, and those that are not
    # mapped, by their positions only.
    before = list(parameters)[: max(list(parameters).index(name) for name in flags)]
    for name in before:
        if parameters[name].default is not inspect.Parameter.empty:
            given.arguments.setdefault(name, parameters[name].default)
    return given.args, given.kwargs


def _is_chosen(target: Any, name: str) -> bool:
    """Whether a flag that may stand in the constructor or in the call stands in the constructor."""
    is_field = isinstance(target, nn.Module) and name in fields(target)
    return is_field and not _is_unset(target, name)


def _is_unset(module: nn.Module, name: str) -> bool:
    return getattr(module, name) in (None, fields(module)[name])


def fields(module: nn.Module) -> Mapping[str, Any]:
    """Returns the defaults of the module's fields, by name; `parent` and `name` are Flax's own."""
    every = dataclasses.fields(module)
    return {f.name: f.default for f in every if f.init and f.name not in ('parent', 'name')}


def _flags_in(names: Iterable[str], training: bool) -> dict[str, bool]:
    return {name: TRAIN_FLAGS[name] == training for name in names if name in TRAIN_FLAGS}
