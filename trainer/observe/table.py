# SPDX-License-Identifier: Apache-2.0
"""The parameter table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from trainer.modules.linen import param_path


def parameter_table(params: Any, collections: Mapping[str, Any]) -> str:
    """Returns path, shape, dtype, size and bytes of each parameter, and the totals.

    Args:
        params: arrays or their shapes.
        collections: the other variables, of which only the totals are shown.
    """
    rows = [('parameter', 'shape', 'dtype', 'size', 'bytes')]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        shape = ' x '.join(map(str, leaf.shape)) or 'scalar'
        size = f'{math.prod(leaf.shape):,}'
        rows.append((param_path(path), shape, str(leaf.dtype), size, f'{nbytes(leaf):,}'))
    lines = _align(rows)
    lines.append(f'{count(params):,} parameters, {human_bytes(nbytes(params))}')
    for name, tree in collections.items():
        lines.append(f'{name}: {count(tree):,} values, {human_bytes(nbytes(tree))}')
    return '\n'.join(lines)


def count(tree: Any) -> int:
    """Returns the number of values in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays or shapes, as if held once."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def human_bytes(size: float) -> str:
    """Returns '3.3 MB' (decimal units)."""
    for unit in ('B', 'kB', 'MB', 'GB'):
        if size < 1000:
            return f'{size:.0f} {unit}' if unit == 'B' else f'{size:.1f} {unit}'
        size /= 1000
    return f'{size:.1f} TB'


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = [row[i].ljust(widths[i]) for i in range(3)]
        right = [row[i].rjust(widths[i]) for i in range(3, len(row))]
        lines.append('  '.join([*left, *right]).rstrip())
    return lines
