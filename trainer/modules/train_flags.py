# SPDX-License-Identifier: Apache-2.0
"""Passes the training flag to Linen modules, through their fields or their call arguments."""

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

# The names of training flags, with their values in training.
TRAIN_FLAGS = {
    'train': True,
    'training': True,
    'is_training': True,
    'deterministic': False,
    'use_running_average': False,
}

# The training flag of the current call, for modules that are created within it.
current: contextvars.ContextVar[bool | None] = contextvars.ContextVar('training', default=None)


def set_fields(module: nn.Module, training: bool) -> nn.Module:
    """Returns the module with its training flags set, where these fields have their defaults.

    This includes the modules in its fields, also within lists, tuples and dicts, and dataclasses
    that hold the settings of a model, such as `TransformerConfig(deterministic=False)`. A flag that
    is also an argument of the module's call is not set: the call gets it.
    """
    # By identity: a module in two places stays one module, because its parameters are shared.
    by_id: dict[int, Any] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, nn.Module) or _is_settings(value):
            if id(value) not in by_id:
                by_id[id(value)] = value  # Settings may refer to themselves.
                replace = replace_flags if isinstance(value, nn.Module) else replace_settings
                by_id[id(value)] = replace(value)
            return by_id[id(value)]
        if type(value) in (list, tuple):
            items = type(value)(visit(item) for item in value)
            # An unchanged container stays the same object, or else `replace_flags` would copy its
            # module.
            return items if any(map(operator.is_not, items, value)) else value
        if type(value) in (dict, FrozenDict):
            named = {key: visit(item) for key, item in value.items()}
            return named if any(named[key] is not value[key] for key in named) else value
        return value

    def replace_flags(module: nn.Module) -> nn.Module:
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

    def replace_settings(settings: Any) -> Any:
        before = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.init}
        defaults = {f.name: f.default for f in dataclasses.fields(settings)}
        after = {name: visit(value) for name, value in before.items()}
        for name, value in _flags_in(before, training).items():
            # `train: int = 100` is a number of steps, and no flag.
            is_flag = all(x is None or isinstance(x, bool) for x in (before[name], defaults[name]))
            if is_flag and before[name] in (None, defaults[name]):
                after[name] = value
        changes = {name: value for name, value in after.items() if value is not before[name]}
        if not changes:
            return settings
        try:
            return dataclasses.replace(settings, **changes)
        except (TypeError, ValueError):  # It has arguments that it does not keep (`InitVar`).
            return settings

    return visit(module)


def _is_settings(value: Any) -> bool:
    """Whether a value is a dataclass of the model's author, with its settings."""
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, nn.Module))


def method_with_training(
    getters: Sequence[Callable[[Any], Any]], training: bool
) -> Callable[..., Any]:
    """Returns a `method` for `Module.apply` that passes the training flag."""
    return functools.partial(call_with_training, getters, training)


def call_with_training(
    getters: Sequence[Callable[[Any], Any]],
    training: bool,
    module: nn.Module,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls a bound module, or a method or submodule of it, with the training flag.

    NNX modules within it get the flag if this is called in `nnx_bridge.pass_training_to_nnx`.

    Args:
        getters: functions that lead from the bound module to a method or submodule, applied one
            after the other; empty for the module's `__call__`.
        training: whether dropout drops and batch norm updates.
        module: bound to its variables.
        *args: positional arguments of the call.
        **kwargs: keyword arguments of the call.
    """
    target: Any = module
    for getter in getters:
        target = getter(target)
    args, kwargs = with_flags(target, args, kwargs, training)
    layers = isinstance(module, nn.Sequential)
    # Klinen modules that a compact method creates read the flag from here.
    token = current.set(training)
    try:
        with pass_training_to_layers(training) if layers else contextlib.nullcontext():
            return target(*args, **kwargs)
    finally:
        current.reset(token)


def pass_training_to_layers(
    training: bool, top: nn.Sequential | None = None
) -> contextlib.AbstractContextManager[Any]:
    """Passes the training flag to the layers of an `nn.Sequential`, which does not do so itself.

    Args:
        training: whether dropout drops and batch norm updates.
        top: the `nn.Sequential`; None if it is the whole model.
    """

    def intercept(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        if context.method_name == '__call__' and is_layer(context.module, top):
            args, kwargs = with_flags(context.module, args, kwargs, training)
        return next_fun(*args, **kwargs)

    return nn.intercept_methods(intercept)


def is_layer(module: nn.Module, top: nn.Sequential | None = None) -> bool:
    """Whether the module is a layer of `top` or of the root, through `nn.Sequential`s alone."""
    if top is not None:
        # By identity, because the parent of layers that a compact method creates is the module of
        # that method.
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
    """Adds the training flags that a target takes and the caller did not pass.

    Args:
        target: a module, method or function.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        training: whether dropout drops and batch norm updates.

    Returns:
        The arguments of the call with the flags.
    """
    signature = inspect.signature(target.__call__ if isinstance(target, nn.Module) else target)
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:
        return args, kwargs  # The call itself raises the better error.
    parameters = signature.parameters
    flags = {
        name: TRAIN_FLAGS[name] == training
        for name, parameter in parameters.items()
        if name in TRAIN_FLAGS
        and name not in bound.arguments
        # Default None: the layer falls back on its field (`nn.merge_param`), which the user set.
        and not (parameter.default is None and _is_set_in_constructor(target, name))
    }
    if not flags:
        return args, kwargs
    bound.arguments.update(flags)
    # By position where possible: lifted modules identify static and unmapped arguments only by
    # position.
    leading = list(parameters)[: max(list(parameters).index(name) for name in flags)]
    for name in leading:
        if parameters[name].default is not inspect.Parameter.empty:
            bound.arguments.setdefault(name, parameters[name].default)
    return bound.args, bound.kwargs


def _is_set_in_constructor(target: Any, name: str) -> bool:
    """Whether a flag that both the constructor and the call take was set in the constructor."""
    is_field = isinstance(target, nn.Module) and name in fields(target)
    return is_field and not _is_unset(target, name)


def _is_unset(module: nn.Module, name: str) -> bool:
    return getattr(module, name) in (None, fields(module)[name])


def fields(module: nn.Module) -> Mapping[str, Any]:
    """Returns the defaults of the module's own fields, by name."""
    # `parent` and `name` are Flax's.
    all_fields = dataclasses.fields(module)
    return {f.name: f.default for f in all_fields if f.init and f.name not in ('parent', 'name')}


def _flags_in(names: Iterable[str], training: bool) -> dict[str, bool]:
    return {name: TRAIN_FLAGS[name] == training for name in names if name in TRAIN_FLAGS}
