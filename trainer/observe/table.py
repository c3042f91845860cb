# SPDX-License-Identifier: Apache-2.0
"""The parameter table, and sizes of trees of arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from trainer.config.columns import align_columns
from trainer.modules.model_view import param_path
from trainer.observe import repeats


def parameter_table(params: Any, collections: Mapping[str, Any]) -> str:
    """Returns path, shape, dtype, size and bytes of each parameter, and the totals.

    Repeated blocks share a row: `block_0..23/norm/scale` with the size `24 x 512`.

    If any parameter is sharded, two more columns show the bytes of each per device, and the mesh
    axes over which its dimensions are sharded.

    Args:
        params: arrays or their shapes, with or without shardings.
        collections: the other variables, of which only the totals are shown.
    """
    by_path = [(param_path(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    by_path.sort(key=lambda item: _numeric_key(item[0]))  # JAX has block_10 before block_2.
    paths, leaves = [path for path, _ in by_path], [leaf for _, leaf in by_path]
    sharded = any(map(_axes, leaves))
    # Without a sharded parameter both columns would only repeat the others.
    more = ('per device', 'axes') if sharded else ()
    rows = [('parameter', 'shape', 'dtype', 'size', 'bytes', *more)]
    kinds = [(leaf.shape, leaf.dtype, _axes(leaf)) for leaf in leaves]
    for line in repeats.fold(paths, kinds):
        leaf = leaves[line.entry]
        shape = ' x '.join(map(str, leaf.shape)) or 'scalar'
        sizes = (math.prod(leaf.shape), nbytes(leaf), bytes_per_device(leaf))
        size, total, each = (repeats.text(line.count, number) for number in sizes)
        row = (line.path, shape, str(leaf.dtype), size, total)
        rows.append((*row, each, _axes(leaf)) if sharded else row)
    lines = align_columns(rows, right=(3, 4, 5))
    per_device = f', {human_bytes(bytes_per_device(params))} per device' if sharded else ''
    lines.append(f'{count(params):,} parameters, {human_bytes(nbytes(params))}{per_device}')
    for name, tree in collections.items():
        lines.append(f'{name}: {count(tree):,} values, {human_bytes(nbytes(tree))}')
    return '\n'.join(lines)


def count(tree: Any) -> int:
    """Returns the number of values in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays or shapes, without counting replicas."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes per device of a tree of arrays or shapes."""

    def size_on_device(leaf: Any) -> int:
        sharding = getattr(leaf, 'sharding', None)
        # Shapes alone have no sharding: they count as replicated.
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size_on_device(leaf) for leaf in jax.tree.leaves(tree))


def human_bytes(size: float) -> str:
    """Returns '3.3 MB' (decimal units)."""
    for unit in ('B', 'kB', 'MB', 'GB'):
        # A number that would be rounded to 1000 takes the next unit.
        if size < 999.95:
            return f'{size:.0f} {unit}' if unit == 'B' else f'{size:.1f} {unit}'
        size /= 1000
    return f'{size:.1f} TB'


def _numeric_key(path: str) -> list[str | int]:
    """Returns a key by which 'block_2' sorts before 'block_10'."""
    return [int(part) if part.isdigit() else part for part in re.split(r'([0-9]+)', path)]


def _axes(leaf: Any) -> str:
    """Returns '- x model' if dimension 1 is sharded over `model`, '' for a replicated array."""
    sharding = getattr(leaf, 'sharding', None)
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return ''
    # A spec may be shorter than the shape: the rest is not sharded.
    spec = (*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec)))
    return ' x '.join('+'.join(a) if isinstance(a, tuple) else a or '-' for a in spec)
