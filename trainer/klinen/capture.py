# SPDX-License-Identifier: Apache-2.0
"""Calls bound models, and captures the intermediate values of their modules."""

from __future__ import annotations

import contextvars
import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn

from trainer import compat
from trainer.klinen import intermediates
from trainer.klinen.binding import Binding
from trainer.klinen.intermediates import (
    Intermediates,
    map_modules,
    mirror,
    module_attributes,
    modules_in,
)


@dataclasses.dataclass(frozen=True)
class Capture:
    """An active `with model.capture_intermediates()`.

    Attributes:
        binding: the binding of the captured model.
        result: filled by the calls of this model.
    """

    binding: Binding
    result: Intermediates = dataclasses.field(default_factory=lambda: Intermediates({}))

    def includes(self, called: Binding) -> bool:
        """Whether a call is of this model, a copy, a submodule or a model that contains it."""
        # Copies and submodules share the `Streams` object of the model that they come from.
        mine, theirs = self.binding.definition, called.definition
        depth = min(len(mine.path), len(theirs.path))
        return mine.streams is theirs.streams and mine.path[:depth] == theirs.path[:depth]

    def fill(self, called: Binding, collection: Mapping[str, Any]) -> None:
        """Stores the intermediates of a call, in the structure of the captured model.

        Args:
            called: the binding of the model that was called.
            collection: the intermediates collection of the call.
        """
        module: nn.Module | None = called.bind_linen()
        # If the captured model is a submodule of the called one, only its intermediates count.
        below = self.binding.definition.path[len(called.definition.path) :]
        if below:
            module = _find_part(called.bind_linen(), below)
        if module is not None:
            values = mirror(module, collection)
            in_model = _embed_in_model(self.binding, called.definition.path, values)
            # In place: the user has the object since the `with` began.
            self.result._values = in_model._values


current: contextvars.ContextVar[Capture | None] = contextvars.ContextVar('capture', default=None)


def run(
    binding: Binding, getters: tuple[Any, ...], args: Any, kwargs: Any, mutable: Iterable[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """Calls a method and returns its output and the mutable collections.

    An active capture of the model gets the intermediates of the call.

    Args:
        binding: the binding of the called model.
        getters: functions that lead from the module to the method; empty for `__call__`.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        mutable: names of the collections that the call may change.
    """
    capture = current.get()
    if capture is None or not capture.includes(binding):
        return binding.apply(getters, args, kwargs, mutable)
    try:
        with nn.intercept_methods(intermediates.store_fields):
            output, changed = binding.apply(
                getters, args, kwargs, {*mutable, intermediates.COLLECTION}
            )
    except TypeError as error:
        # Flax requires all branches to change the same collections. The call itself is valid, so
        # repeat it without the collection.
        if not compat.branches_differ(error, intermediates.COLLECTION):
            raise
        warnings.warn(
            f'{type(binding.definition.module).__name__}: the branches of nn.cond or nn.switch '
            'store different intermediate values, so this call is not captured',
            stacklevel=3,
        )
        output, changed = binding.apply(getters, args, kwargs, mutable)
    capture.fill(binding, changed.pop(intermediates.COLLECTION, {}))
    return output, changed


def _embed_in_model(
    binding: Binding, path: tuple[str, ...], values: Intermediates
) -> Intermediates:
    """Returns the intermediates of the submodule at `path`, in the structure of the model."""
    own, module = binding.definition.path, binding.bind_linen()
    if own[: len(path)] == path:  # The call was of this module, or of one that contains it.
        return values
    if own != path[: len(own)]:  # The call was elsewhere in the model.
        return mirror(module, {})
    names = [name for name, value in module_attributes(module).items() if any(modules_in(value))]

    def embed(part: nn.Module) -> Intermediates:
        return _embed_in_model(binding.bind_part(part), path, values)

    parts = binding.bind_linen(with_training=False)
    return Intermediates({n: map_modules(getattr(parts, n), embed) for n in names})


def _find_part(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """Returns the submodule that Linen has bound at `path`, None if there is none."""
    assert module.scope is not None
    if module.scope.path == path:
        return module
    parts = (part for value in module_attributes(module).values() for part in modules_in(value))
    return next((match for part in parts if (match := _find_part(part, path))), None)
