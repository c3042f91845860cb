# SPDX-License-Identifier: Apache-2.0
"""Passes the training flag across bridges between the module systems (`flax.nnx.bridge`).

Bridges themselves do not pass it on, nor, from NNX to Linen, which collections are mutable.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn

from trainer import compat
from trainer.config.errors import UserError
from trainer.modules import pmap_axes, train_flags

# The mutable collections of a bridged Linen module. In evaluation only what a task may read.
_IN_TRAINING = nn.DenyList(('params', 'perturbations'))
_IN_EVALUATION = ('intermediates',)


def set_training(module: Any, training: bool) -> None:
    """Switches an NNX module and its submodules to training or evaluation (`train()`, `eval()`).

    Raises:
        UserError: if an attribute of the module hides that method.
    """
    name = 'train' if training else 'eval'
    # From the class: an instance attribute of this name hides the method.
    method = getattr(type(module), name)
    if name in vars(module) or not callable(method):
        raise UserError(
            f'config.model: {type(module).__name__}.{name} hides the method `{name}()` of an NNX '
            'module, which switches between training and evaluation. Rename the attribute, or let '
            'the call take a training flag as an argument (`train`)'
        )
    method(module)


def linen_parts(module: Any) -> list[Any]:
    """Returns the bridges to Linen modules within an NNX module."""
    from flax import nnx

    nodes = (node for _, node in nnx.iter_graph(module))
    return [node for node in nodes if isinstance(node, nnx.bridge.ToNNX)]


def run_with_linen(run: Callable[[], Any], parts: list[Any], training: bool) -> Any:
    """Returns `run()`, which calls an NNX module with bridges to Linen modules.

    Args:
        run: calls the NNX module.
        parts: its bridges, from `linen_parts`.
        training: whether dropout drops and batch norm updates.
    """
    # Restored afterwards: the module is a part of the graph, which must not change in a call.
    modules = [compat.linen_module(part) for part in parts]
    for part, module in zip(parts, modules, strict=True):
        compat.set_linen_module(part, train_flags.set_fields(module, training))
    mutable: Any = _IN_TRAINING if training else _IN_EVALUATION
    try:
        with nn.intercept_methods(_pass_training_to_roots(training)):
            # A bridge takes the mutable collections from the Linen module that is calling it, so
            # call it from one.
            return _Caller().apply({}, run, mutable=mutable)[0]
    finally:
        for part, module in zip(parts, modules, strict=True):
            compat.set_linen_module(part, module)


class _Caller(nn.Module):
    # No parameters and no submodules: it only provides a scope with mutable collections.
    def __call__(self, run: Callable[[], Any]) -> Any:
        return run()


def _pass_training_to_roots(training: bool) -> Callable[..., Any]:
    def intercept(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module, name = context.module, context.method_name
        layer = name == '__call__' and train_flags.is_layer(module)
        # Roots, which the bridges call without flags, and layers of `nn.Sequential`; every other
        # module gets its flags from the module that calls it.
        if layer or not isinstance(module.parent, nn.Module):
            # For a scan over layers Flax calls a lambda, which is not an attribute of the module.
            target = module if name == '__call__' else getattr(module, name, None)
            if target is not None:
                args, kwargs = train_flags.with_flags(target, args, kwargs, training)
        return next_fun(*args, **kwargs)

    return intercept


def allow_names_for_rules() -> contextlib.AbstractContextManager[Any]:
    """Allows NNX variables to name dimensions for sharding rules, not only for mesh axes.

    Returns:
        The context in which to create such variables, or to read their names.
    """
    nnx = sys.modules.get('flax.nnx')
    return contextlib.nullcontext() if nnx is None else nnx.use_eager_sharding(False)


@contextlib.contextmanager
def pass_training_to_nnx(training: bool) -> Iterator[None]:
    """Passes the training flag to NNX modules within Linen modules that the block calls."""
    # Not an import, which is slow: a model contains bridges only if this module is loaded.
    bridge = sys.modules.get('flax.nnx.bridge')
    if bridge is None:
        yield
        return

    def intercept(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if isinstance(module, bridge.ToLinen) and context.method_name == '__call__':
            # The bridge creates the NNX module within its call, so the flag can only be set by the
            # method that it runs.
            kwargs = {**kwargs, 'nnx_method': with_training(module, kwargs.get('nnx_method'))}
        return next_fun(*args, **kwargs)

    def with_training(module: Any, method: Any) -> Callable[..., Any]:
        method = method or '__call__'
        method = getattr(module.nnx_class, method) if isinstance(method, str) else method

        def call(inner: Any, *args: Any, **kwargs: Any) -> Any:
            set_training(inner, training)
            bound = functools.partial(method, inner)
            args, kwargs = train_flags.with_flags(bound, args, kwargs, training)
            with pmap_axes.omit_in_nnx(inner):
                return bound(*args, **kwargs)

        return call

    with allow_names_for_rules(), nn.intercept_methods(intercept):
        yield
