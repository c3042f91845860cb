# SPDX-License-Identifier: Apache-2.0
"""Builds the hooks of `config.hooks`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer.config import targets
from trainer.config.durations import Duration
from trainer.config.errors import UserError
from trainer.config.sections import Sections


@dataclasses.dataclass(frozen=True, kw_only=True)
class HookRules:
    """When a hook is called, and what happens if it fails.

    Attributes:
        every: period of its events of kind 'step', which replace 'log', 'eval' and 'save'; None for
            these three.
        on_error: 'stop' or 'warn'.
    """

    every: Duration | None = None
    on_error: str = 'stop'


def build_hooks(sections: Sections) -> dict[str, Any]:
    """Returns the hooks by name.

    Raises:
        UserError: for an invalid argument, and for a hook that cannot be called.
    """
    hooks = {}
    for name, section in sections.hooks.items():
        path = f'config.hooks.{name}'
        hook = targets.instantiate(section.node, path)
        if not callable(hook):
            raise UserError(
                f"{path}: expected a function, as ref='package.module:function', or an object "
                f"with a method __call__, as target='package.module:Class'; got {hook!r}"
            )
        hooks[name] = hook
    return hooks


def build_hook_rules(sections: Sections) -> Mapping[str, HookRules]:
    """Returns the rules of each hook by its name."""
    return {
        name: HookRules(every=section.every, on_error=section.on_error)
        for name, section in sections.hooks.items()
    }
