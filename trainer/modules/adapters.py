# SPDX-License-Identifier: Apache-2.0
"""Where a package above adds a kind of Linen modules of its own, which is unknown here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a kind of Linen modules needs beside what all Linen modules need.

    Attributes:
        intercept: runs around each method of each Linen module that a model calls, as
            `flax.linen.intercept_methods` takes it.
        plain: called as `plain(intermediates)` with the nested dicts that a call has left; returns
            them as a task reads them.
        refusal: called as `refusal(module)`; returns why a module cannot be a config's model, or
            None.
    """

    intercept: Callable[..., Any]
    plain: Callable[[Mapping[str, Any]], dict[str, Any]]
    refusal: Callable[[object], str | None]


# Empty in a run whose modules are all Flax's: then none of it costs anything.
registered: list[Adapter] = []


def register(adapter: Adapter) -> None:
    """Applies an adapter to all calls of Linen modules from here on."""
    if adapter not in registered:
        registered.append(adapter)
