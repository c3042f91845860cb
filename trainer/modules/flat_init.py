# SPDX-License-Identifier: Apache-2.0
"""Parameters that are initialized as a matrix, with dimension names for their final shape.

`nn.DenseGeneral` calls its initializer with the shape of a matrix, and reshapes the result. The
names of `nn.with_partitioning(init, ('data', None, None))` are those of the final dimensions. As a
sharding constraint on the matrix they raise an error whenever a mesh is in context. The constraint
can be omitted, because the whole state is created with the sharding of the run.
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
    """Returns a context in which Linen modules accept such initializers.

    Also needed outside of initialization: every call evaluates the initializers for their shapes.
    """
    return nn.intercept_methods(intercept)


def intercept(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Linen interceptor that allows names of more dimensions than an initializer is called for."""
    module = context.module
    if not isinstance(module, nn.DenseGeneral):
        return next_fun(*args, **kwargs)
    initializers = {
        name: value
        for name in train_flags.fields(module)
        if name.endswith('_init') and _is_function(value := getattr(module, name))
    }
    # For this call alone: whatever else reads the fields finds the user's initializers.
    try:
        for name, value in initializers.items():
            compat.set_attribute(module, name, _Flat(value))
        return next_fun(*args, **kwargs)
    finally:
        for name, value in initializers.items():
            compat.set_attribute(module, name, value)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, (nn.Module, type, _Flat))


@dataclasses.dataclass(frozen=True)
class _Flat:
    """An initializer whose names may be of more dimensions than it is called for."""

    init: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value = self.init(*args, **kwargs)
        is_box = isinstance(value, meta.Partitioned)
        return _FlatBox(value) if is_box and _is_flat(value) else value

    # A module may read attributes of its initializer, if this is an object.
    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.init, name)


class _FlatBox(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A box that unboxes without its constraint, and turns into the original when reshaped."""

    box: Any

    def unbox(self) -> Any:
        # Not `self.box.unbox()`, which adds the constraint.
        return self.box.value

    def replace_boxed(self, val: Any) -> Any:
        # The reshaped value has as many dimensions as names, and needs this box no more.
        box = self.box.replace_boxed(val)
        return _FlatBox(box) if _is_flat(box) else box

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return _FlatBox(self.box.add_axis(index, params))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return _FlatBox(self.box.remove_axis(index, params))

    def get_partition_spec(self) -> Any:
        return self.box.get_partition_spec()

    def to_nnx_metadata(self) -> Any:
        # Only the final parameters are converted, so this one was not reshaped.
        raise UserError(
            f'config.model: {len(self.box.names)} dimension names {self.box.names} for a parameter '
            f'of shape {self.box.value.shape}; give one name per dimension'
        )


def _is_flat(box: Any) -> bool:
    return len(box.names) > getattr(box.value, 'ndim', len(box.names))
