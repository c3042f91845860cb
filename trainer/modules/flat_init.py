# SPDX-License-Identifier: Apache-2.0
"""Parameters that are initialized flat, with dimension names for their final shape.

`nn.DenseGeneral` calls its initializer with the shape of a matrix, and reshapes the result. The
names of `nn.with_partitioning(init, ('data', None, None))` are those of the final dimensions. As a
sharding constraint of the matrix they raise an error wherever a mesh is in context. The constraint
can be left out, because the whole state is created with the sharding of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax import struct
from flax.core import meta

from trainer import compat
from trainer.config.errors import UserError
from trainer.modules import train_flags


def allow_flat_names() -> contextlib.AbstractContextManager[Any]:
    """Returns a context for calls of Linen modules: any call asks initialisers for shapes."""
    return nn.intercept_methods(intercept)


def intercept(
    following: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Runs a method of a module, with initialisers that return flat values if it asks for some."""
    module = context.module
    if not isinstance(module, nn.DenseGeneral):
        return following(*args, **kwargs)
    before = {
        name: value
        for name in train_flags.fields(module)
        if name.endswith('_init') and _is_function(value := getattr(module, name))
    }
    try:
        for name, value in before.items():
            compat.set_attribute(module, name, _Flat(value))
        return following(*args, **kwargs)
    finally:
        for name, value in before.items():
            compat.set_attribute(module, name, value)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, (nn.Module, type, _Flat))


@dataclasses.dataclass(frozen=True)
class _Flat:
    """An initialiser whose names may be for more dimensions than it is asked for."""

    init: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self.init(*args, **kwargs)
        is_box = isinstance(made, meta.Partitioned)
        return _FlatBox(made) if is_box and _is_flat(made) else made

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.init, name)


class _FlatBox(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A box that comes off without its constraint, and is itself again around a reshaped value."""

    box: Any

    def unbox(self) -> Any:
        return self.box.value

    def replace_boxed(self, val: Any) -> Any:
        box = self.box.replace_boxed(val)
        return _FlatBox(box) if _is_flat(box) else box

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return _FlatBox(self.box.add_axis(index, params))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return _FlatBox(self.box.remove_axis(index, params))

    def get_partition_spec(self) -> Any:
        return self.box.get_partition_spec()

    def to_nnx_metadata(self) -> Any:
        raise UserError(
            f'config.model: {len(self.box.names)} dimensions are named {self.box.names} of a '
            f'parameter that has shape {self.box.value.shape}; name as many as it has'
        )


def _is_flat(box: Any) -> bool:
    return len(box.names) > getattr(box.value, 'ndim', len(box.names))
