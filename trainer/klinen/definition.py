# SPDX-License-Identifier: Apache-2.0
"""The static (hashable) part of a bound model, which is part of the jit cache key."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from trainer.modules import train_flags
from trainer.modules.rng_streams import Streams


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """The static part of a bound model; equal definitions share compiled programs.

    Attributes:
        module: the module, unbound, with its training flags as constructed.
        path: the key path of the module in the model that contains it.
        streams: the RNG streams that its calls have requested; one object for a model, its copies
            and its submodules.
    """

    module: nn.Module
    path: tuple[str, ...] = ()
    # 'default' is for NNX modules within: without it they get a constant key.
    streams: Streams = dataclasses.field(default_factory=lambda: Streams({'dropout', 'default'}))
    _by_training: dict[bool, nn.Module] = dataclasses.field(default_factory=dict)

    def with_training(self, training: bool) -> nn.Module:
        """Returns the module with its training flags set."""
        if training not in self._by_training:
            self._by_training[training] = train_flags.set_fields(self.module, training)
        return self._by_training[training]

    @functools.cached_property
    def _key(self) -> Any:
        # Without `streams`: they grow with the calls, and a program must not be compiled again for
        # that.
        return self.path, _fingerprint(self.module, {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Definition) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _fingerprint(value: Any, seen: dict[int, int]) -> Any:
    """Returns a hashable value that is equal for modules that compute the same."""
    if isinstance(value, nn.Module):
        # A module that occurs twice shares its parameters, unlike two equal modules.
        if id(value) in seen:
            return type(value), seen[id(value)]
        seen[id(value)] = len(seen)
        items = ((name, getattr(value, name)) for name in sorted(train_flags.fields(value)))
        return type(value), value.name, tuple((n, _fingerprint(v, seen)) for n, v in items)
    if isinstance(value, Mapping):
        return tuple((name, _fingerprint(item, seen)) for name, item in value.items())
    if type(value) in (list, tuple):
        return type(value), tuple(_fingerprint(item, seen) for item in value)
    try:
        hash(value)
    except TypeError:  # Such as an array: equal only to itself.
        return type(value), id(value)
    # With the type, because 1 == 1.0 == True.
    return type(value), value
