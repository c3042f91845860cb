# SPDX-License-Identifier: Apache-2.0
"""Adapters, with which a package adds its own kind of Linen modules (Klinen does)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """Special treatment of a kind of Linen modules.

    Attributes:
        intercept: runs around each method of each Linen module that a model calls, as
            `flax.linen.intercept_methods` takes it.
        plain: called as `plain(intermediates)` with the nested dicts of a call; returns them as a
            task reads them.
        refusal: called as `refusal(module)`; returns why a module cannot be a config's model, or
            None.
    """

    intercept: Callable[..., Any]
    plain: Callable[[Mapping[str, Any]], dict[str, Any]]
    refusal: Callable[[object], str | None]


# Empty in a run with only Flax's own modules, which then costs nothing.
registered: list[Adapter] = []


def register(adapter: Adapter) -> None:
    """Applies an adapter to all calls of Linen modules from here on."""
    if adapter not in registered:
        registered.append(adapter)
