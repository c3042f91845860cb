# SPDX-License-Identifier: Apache-2.0
"""Returns a trained model as the user's own module, to call in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.klinen.bound import bind
from trainer.modules.functional import Functional
from trainer.modules.linen import Linen


def bind_for_notebook(model: Functional, variables: Mapping[str, Any]) -> Any:
    """Returns the user's own module with these variables in it, in evaluation mode.

    A Linen module comes as a bound Klinen model; an NNX module as it is.

    Args:
        model: of the run, as `as_functional` wraps it.
        variables: all collections, 'params' among them.
    """
    if isinstance(model, Linen):
        made: Any = bind(model.module, variables)
        return made.eval()
    from trainer.modules.nnx import NNX  # Flax's NNX takes long to import.

    assert isinstance(model, NNX)
    return model.with_variables(variables)
