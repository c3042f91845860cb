# SPDX-License-Identifier: Apache-2.0
"""The adapter that lets `trainer.modules` call Linen models that contain Klinen modules."""

from __future__ import annotations

from trainer.klinen import intermediates
from trainer.klinen.bound import Bound
from trainer.modules.adapters import Adapter


def refusal(module: object) -> str | None:
    """Returns why a bound model cannot be the model of a config; None for any other module."""
    if not isinstance(module, Bound):
        return None
    return (
        f'{type(module).__name__} is bound to variables, which a run does not start from; pass '
        'model.clone(), and load the weights with config.init_from'
    )


# `intercept` stores fields `knn.Intermediate` in a Linen collection, wrapped for JAX's
# transformations; `plain` unwraps them before a task reads them.
ADAPTER = Adapter(
    intercept=intermediates.store_fields, plain=intermediates.unwrap_values, refusal=refusal
)
