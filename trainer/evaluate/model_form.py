# SPDX-License-Identifier: Apache-2.0
"""Evaluates another form of the model (`config.evals.<name>.model`) with the trained variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax.core import meta

from trainer.config.errors import UserError, and_more
from trainer.evaluate.step import EvalStep
from trainer.modules.model_view import param_path
from trainer.modules.shapes import describe


def find_fresh_collections(
    step: EvalStep, variables: Mapping[str, Any], batch: Any
) -> frozenset[str]:
    """Checks that the trained variables are those of a form of the model, or more.

    Args:
        step: evaluates one batch with that form.
        variables: the trained ones, arrays or their shapes.
        batch: shapes of a batch.

    Returns:
        Names of the collections that only this form has, such as a cache for decoding.

    Raises:
        UserError: naming the parameters that differ.
    """
    # A new function object: a cached trace would not record which fields the task reads.
    shapes = jax.eval_shape(lambda batch: meta.unbox(step.init(batch)), batch)
    trained = step.variables_of_one(variables)
    fresh = shapes.keys() - trained.keys()
    old = dict(jax.tree_util.tree_leaves_with_path(trained))
    found = []
    for path, after in jax.tree_util.tree_leaves_with_path(
        {name: tree for name, tree in shapes.items() if name not in fresh}
    ):
        before = old.get(path)
        # Not the dtype: parameters may have been cast.
        if before is None or before.shape != after.shape:
            found.append(f'{param_path(path)}: {describe(before)}, here {describe(after)}')
    if found:
        raise UserError(
            'its `model` has other variables than config.model, so it cannot be evaluated with '
            f'the trained ones: {and_more(found, 5, "; ")}'
        )
    return frozenset(fresh)
