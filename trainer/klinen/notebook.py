# SPDX-License-Identifier: Apache-2.0
"""Binds the user's own module to trained variables, to call it in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.klinen.bound import bind
from trainer.modules.functional import Functional
from trainer.modules.linen import Linen


def bind_for_notebook(model: Functional, variables: Mapping[str, Any]) -> Any:
    """Returns the user's own module with these variables, in evaluation mode.

    A Linen module is returned as a bound Klinen model, an NNX module as itself.

    Args:
        model: the run's model, as `as_functional` wraps it.
        variables: all collections, including 'params'.
    """
    if isinstance(model, Linen):
        bound: Any = bind(model.module, variables)
        return bound.eval()
    from trainer.modules.nnx import NNX  # Importing Flax's NNX is slow.

    assert isinstance(model, NNX)
    return model.with_variables(variables)
