# SPDX-License-Identifier: Apache-2.0
"""The adapter for Klinen modules within any Linen model."""

from __future__ import annotations

from trainer.klinen import intermediates
from trainer.klinen.bound import Bound
from trainer.modules.adapters import Adapter


def refusal(module: object) -> str | None:
    """Returns why a bound model cannot be a config's model; None for any other module."""
    if not isinstance(module, Bound):
        return None
    return (
        f'{type(module).__name__} is bound to variables, which a run would not start from; give '
        'model.clone(), and load the weights with config.init_from'
    )


ADAPTER = Adapter(
    intercept=intermediates.store_fields, plain=intermediates.unwrap_values, refusal=refusal
)
