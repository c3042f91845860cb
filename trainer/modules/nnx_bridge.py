# SPDX-License-Identifier: Apache-2.0
"""Bridges between the module systems (`flax.nnx.bridge`): both sides are told whether they train.

A bridge passes on neither the mode nor, from NNX into Linen, which collections may change.
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

# What a call in training may change within a Linen module; in evaluation only intermediates.
_IN_TRAINING = nn.DenyList(('params', 'perturbations'))
_IN_EVALUATION = ('intermediates',)


def switch(module: Any, training: bool) -> None:
    """Puts an NNX module and its parts into a mode.

    Raises:
        UserError: if it has something else where the method that does it should be.
    """
    name = 'train' if training else 'eval'
    method = getattr(type(module), name)
    if name in vars(module) or not callable(method):
        raise UserError(
            f'config.model: {type(module).__name__}.{name} is not the method `{name}()` of an NNX '
            'module, which switches its mode. Give what it holds another name, or let the call '
            'take the mode as an argument (`train`)'
        )
    method(module)


def linen_parts(module: Any) -> list[Any]:
    """Returns the bridges to Linen modules within an NNX module."""
    from flax import nnx

    nodes = (node for _, node in nnx.iter_graph(module))
    return [node for node in nodes if isinstance(node, nnx.bridge.ToNNX)]


def run_with_linen(run: Callable[[], Any], parts: list[Any], training: bool) -> Any:
    """Returns `run()`, which calls Linen modules through bridges.

    Args:
        run: calls an NNX module.
        parts: its bridges, as `linen_parts` finds them.
        training: the mode.
    """
    before = [compat.linen_module(part) for part in parts]
    for part, module in zip(parts, before, strict=True):
        compat.set_linen_module(part, train_flags.set_fields(module, training))
    mutable: Any = _IN_TRAINING if training else _IN_EVALUATION
    try:
        with nn.intercept_methods(_telling_roots(training)):
            # A bridge asks the Linen module that calls it what may change.
            return _Caller().apply({}, run, mutable=mutable)[0]
    finally:
        for part, module in zip(parts, before, strict=True):
            compat.set_linen_module(part, module)


class _Caller(nn.Module):
    def __call__(self, run: Callable[[], Any]) -> Any:
        return run()


def _telling_roots(training: bool) -> Callable[..., Any]:
    def intercept(
        following: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module, name = context.module, context.method_name
        layer = name == '__call__' and train_flags.is_layer(module)
        if layer or not isinstance(module.parent, nn.Module):
            # Around a scan over layers Flax calls a lambda, not a method of the module.
            target = module if name == '__call__' else getattr(module, name, None)
            if target is not None:
                args, kwargs = train_flags.with_flags(target, args, kwargs, training)
        return following(*args, **kwargs)

    return intercept


def names_for_rules() -> contextlib.AbstractContextManager[Any]:
    """Lets variables of NNX name dimensions for the rules of a run: not all are axes of its mesh.

    Returns:
        The context to make such variables in, or to read their names.
    """
    nnx = sys.modules.get('flax.nnx')
    return contextlib.nullcontext() if nnx is None else nnx.use_eager_sharding(False)


@contextlib.contextmanager
def telling_nnx(training: bool) -> Iterator[None]:
    """Tells the mode to the NNX modules within the Linen modules that are called meanwhile."""
    bridge = sys.modules.get('flax.nnx.bridge')  # Whoever has made a bridge has imported it.
    if bridge is None:
        yield
        return

    def intercept(
        following: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if isinstance(module, bridge.ToLinen) and context.method_name == '__call__':
            kwargs = {**kwargs, 'nnx_method': told(module, kwargs.get('nnx_method'))}
        return following(*args, **kwargs)

    def told(module: Any, method: Any) -> Callable[..., Any]:
        method = method or '__call__'
        method = getattr(module.nnx_class, method) if isinstance(method, str) else method

        def call(inner: Any, *args: Any, **kwargs: Any) -> Any:
            switch(inner, training)
            bound = functools.partial(method, inner)
            args, kwargs = train_flags.with_flags(bound, args, kwargs, training)
            with pmap_axes.watching(inner):
                return bound(*args, **kwargs)

        return call

    with names_for_rules(), nn.intercept_methods(intercept):
        yield
