# SPDX-License-Identifier: Apache-2.0
"""The method that a call of a bound model runs, for `Module.apply`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from trainer.modules import nnx_bridge, train_flags


def make_method(steps: Sequence[Callable[[Any], Any]], training: bool) -> Callable[..., Any]:
    """Returns the function for `Module.apply` that tells the mode to what it calls.

    Args:
        steps: lead one after the other from the bound module to what is called: a method or a
            sub-module; none for the module's `__call__`.
        training: the mode.
    """

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        target: Any = module
        for step in steps:
            target = step(target)
        args, kwargs = train_flags.with_flags(target, args, kwargs, training)
        layers = isinstance(module, nn.Sequential)
        token = train_flags.current.set(training)
        try:
            with (
                train_flags.telling_layers(training) if layers else contextlib.nullcontext(),
                nnx_bridge.telling_nnx(training),
            ):
                return target(*args, **kwargs)
        finally:
            train_flags.current.reset(token)

    return call
