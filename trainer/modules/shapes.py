# SPDX-License-Identifier: Apache-2.0
"""Descriptions of dtypes and shapes, and of differences between trees of arrays."""

from __future__ import annotations

from typing import Any

import jax

from trainer.config.errors import and_more
from trainer.modules.model_view import param_path


def changes(expected: Any, actual: Any) -> str:
    """Returns 'step: int32[] -> int64[]; ...' for the leaves that differ, or ''."""
    old = dict(jax.tree_util.tree_leaves_with_path(expected))
    new = dict(jax.tree_util.tree_leaves_with_path(actual))
    lines = []
    # A merged dict and not a set, to keep the order of the tree.
    for path in {**old, **new}:
        before, after = (describe(tree.get(path)) for tree in (old, new))
        if before != after:
            lines.append(f'{param_path(path)}: {before} -> {after}')
    return and_more(lines, 5, '; ')


def describe(x: Any) -> str:
    """Returns 'float32[3, 4]' for an array or its shape, 'absent' for None."""
    if x is None:
        return 'absent'
    return f'{x.dtype}{list(x.shape)}' if hasattr(x, 'dtype') else type(x).__name__
