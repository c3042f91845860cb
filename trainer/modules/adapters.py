# SPDX-License-Identifier: Apache-2.0
"""Adapters, through which a package such as Klinen supports its own kind of Linen modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """Special treatment of a kind of Linen modules.

    Attributes:
        intercept: an interceptor for `flax.linen.intercept_methods`, around each method of each
            Linen module that a model calls.
        plain: called as `plain(intermediates)` with the nested dicts of a call; returns them in the
            form that a task reads.
        refusal: called as `refusal(module)`; returns why a module cannot be the model of a config,
            or None.
    """

    intercept: Callable[..., Any]
    plain: Callable[[Mapping[str, Any]], dict[str, Any]]
    refusal: Callable[[object], str | None]


# Empty unless a package such as Klinen is imported, so a plain Flax model pays nothing.
registered: list[Adapter] = []


def register(adapter: Adapter) -> None:
    """Applies an adapter to all later calls of Linen modules."""
    if adapter not in registered:
        registered.append(adapter)
