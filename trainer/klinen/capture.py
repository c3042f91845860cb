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
    """A `with model.capture_intermediates()` that is open.

    Attributes:
        binding: of the model that is captured.
        result: filled by the calls of this model.
    """

    binding: Binding
    result: Intermediates = dataclasses.field(default_factory=lambda: Intermediates({}))

    def includes(self, called: Binding) -> bool:
        """Whether a call is of this model, of a copy or a part, or of what it is a part of."""
        mine, theirs = self.binding.definition, called.definition
        depth = min(len(mine.path), len(theirs.path))
        return mine.streams is theirs.streams and mine.path[:depth] == theirs.path[:depth]

    def fill(self, called: Binding, kept: Mapping[str, Any]) -> None:
        """Takes what a call has kept, in the structure of the model that is captured."""
        module: nn.Module | None = called.bind_linen()
        below = self.binding.definition.path[len(called.definition.path) :]
        if below:
            module = _find_part(called.bind_linen(), below)
        if module is not None:
            found = _embed_in_model(self.binding, called.definition.path, mirror(module, kept))
            self.result._values = found._values


current: contextvars.ContextVar[Capture | None] = contextvars.ContextVar('capture', default=None)


def run(
    binding: Binding, getters: tuple[Any, ...], args: Any, kwargs: Any, mutable: Iterable[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """Calls a method, and returns its output and the collections that it may change.

    A capture that is open gets what the call keeps.

    Args:
        binding: of the model that is called.
        getters: lead from the module to the method; none for `__call__`.
        args: of the call.
        kwargs: of the call.
        mutable: names of these collections.
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
        if not compat.branches_differ(error, intermediates.COLLECTION):
            raise
        warnings.warn(
            f'{type(binding.definition.module).__name__}: the branches of nn.cond or nn.switch '
            'keep other intermediate values, so none of this call is captured',
            stacklevel=3,
        )
        output, changed = binding.apply(getters, args, kwargs, mutable)
    capture.fill(binding, changed.pop(intermediates.COLLECTION, {}))
    return output, changed


def _embed_in_model(binding: Binding, path: tuple[str, ...], found: Intermediates) -> Intermediates:
    """Returns what the part of a model at `path` has kept, in the structure of the model."""
    own, module = binding.definition.path, binding.bind_linen()
    if own[: len(path)] == path:
        return found
    if own != path[: len(own)]:
        return mirror(module, {})
    names = [name for name, value in module_attributes(module).items() if any(modules_in(value))]

    def keep(part: nn.Module) -> Intermediates:
        return _embed_in_model(binding.bind_part(part), path, found)

    parts = binding.bind_linen(with_training=False)
    return Intermediates({n: map_modules(getattr(parts, n), keep) for n in names})


def _find_part(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """Returns the part of a bound module that Linen has bound at `path`."""
    assert module.scope is not None
    if module.scope.path == path:
        return module
    parts = (part for value in module_attributes(module).values() for part in modules_in(value))
    return next((found for part in parts if (found := _find_part(part, path))), None)
