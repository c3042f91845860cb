# SPDX-License-Identifier: Apache-2.0
"""Describes dtypes and shapes of arrays, and differences between trees of arrays."""

from __future__ import annotations

from typing import Any

import jax

from trainer.config.text import and_more
from trainer.modules.model_view import param_path


def changes(expected: Any, given: Any) -> str:
    """Returns 'step: int32[] -> int64[]; ...' for the leaves that differ, or ''."""
    old = dict(jax.tree_util.tree_leaves_with_path(expected))
    new = dict(jax.tree_util.tree_leaves_with_path(given))
    found = []
    for path in {**old, **new}:
        before, after = (describe(tree.get(path)) for tree in (old, new))
        if before != after:
            found.append(f'{param_path(path)}: {before} -> {after}')
    return and_more(found, 5, '; ')


def describe(x: Any) -> str:
    """Returns 'float32[3, 4]' for an array or its shape, 'absent' for None."""
    if x is None:
        return 'absent'
    return f'{x.dtype}{list(x.shape)}' if hasattr(x, 'dtype') else type(x).__name__
