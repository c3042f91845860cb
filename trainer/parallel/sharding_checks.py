# SPDX-License-Identifier: Apache-2.0
"""Checks the rules of `config.sharding`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from trainer.config.errors import UserError
from trainer.modules import patterns

# The mesh axes over which a dimension is sharded: none, one, or several.
Axes = str | tuple[str, ...] | None


def check_pairs(rules: Sequence[Any]) -> None:
    """Raises a UserError for a rule that is not a pair of a name or pattern and axes."""
    for pair in rules:
        if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(
                "config.sharding: a rule is a pair such as ('mlp', 'model') or ('.*/kernel', "
                f"(None, 'model')); got {pair!r}"
            )


def check_patterns(rules: Sequence[Any]) -> None:
    """Raises a UserError unless the rules are pairs of a regular expression and a list of axes."""
    check_pairs(rules)
    for pattern, axes in rules:
        patterns.compile_pattern(pattern, 'config.sharding')
        if isinstance(axes, str) or not isinstance(axes, Sequence):
            raise UserError(
                f'config.sharding: the pattern {pattern!r} needs a mesh axis or None for each '
                f'dimension, as in (None, {axes!r}); got {axes!r}'
            )


def count_shards(axes: Axes, mesh: Mesh, who: str) -> int:
    """Returns the number of shards of a dimension that is sharded over `axes`.

    Args:
        axes: names of mesh axes.
        mesh: the device mesh.
        who: the rule that names them, for the message.

    Raises:
        UserError: if the mesh has no such axis.
    """
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    for name in names:
        if name not in mesh.shape:
            raise UserError(
                f'config.sharding: {who} names the mesh axis {name!r}, but the axes of config.mesh '
                f'are {", ".join(mesh.shape)}'
            )
    return math.prod(mesh.shape[name] for name in names)


def check_spec(path: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh, who: str) -> None:
    """Raises a UserError unless a parameter of this shape can be sharded with this spec."""
    if len(spec) > len(shape):
        raise UserError(
            f'config.sharding: {who} has axes for {len(spec)} dimensions, but {path} has '
            f'shape {shape}'
        )
    # Checked here, because JAX's error for it names neither the parameter nor the rule.
    used = [a for axes in spec if axes for a in ((axes,) if isinstance(axes, str) else axes)]
    if len(set(used)) < len(used):
        raise UserError(f'config.sharding: {who} uses a mesh axis twice in {path}: {tuple(spec)}')
    for dimension, axes in enumerate(spec):
        shards = count_shards(axes, mesh, who)
        if shape[dimension] % shards:
            raise UserError(
                f'config.sharding: {who} shards dimension {dimension} of {path} {shape} '
                f'over {axes!r}, but {shape[dimension]} is not divisible by {shards}'
            )
