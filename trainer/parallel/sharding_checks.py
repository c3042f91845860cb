# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with the rules of `config.sharding`, said before anything is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from trainer.config import patterns
from trainer.config.errors import UserError

# What a dimension is cut over: nothing, one mesh axis, or several.
Axes = str | tuple[str, ...] | None


def check_pairs(rules: Sequence[Any]) -> None:
    """Raises a UserError for a rule that is no pair of a name or pattern and something else."""
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
        patterns.compiled(pattern, 'config.sharding')
        if isinstance(axes, str) or not isinstance(axes, Sequence):
            raise UserError(
                f'config.sharding: the pattern {pattern!r} needs a mesh axis or None for each '
                f'dimension, as in (None, {axes!r}); got {axes!r}'
            )


def count_shards(axes: Axes, mesh: Mesh, who: str) -> int:
    """Returns the number of count_shards that `axes` cut a dimension into.

    Args:
        axes: of the mesh.
        mesh: the device mesh.
        who: asks for them, in the words of a message.

    Raises:
        UserError: if the mesh has no such axis.
    """
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    for name in names:
        if name not in mesh.shape:
            raise UserError(
                f'config.sharding: {who} asks for the mesh axis {name!r}, and the axes of '
                f'config.mesh are {", ".join(mesh.shape)}'
            )
    return math.prod(mesh.shape[name] for name in names)


def check_spec(path: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh, who: str) -> None:
    """Raises a UserError unless a parameter of this shape can be cut like this over the mesh."""
    if len(spec) > len(shape):
        raise UserError(
            f'config.sharding: {who} gives {len(spec)} dimensions to {path}, which has '
            f'shape {shape}'
        )
    used = [a for axes in spec if axes for a in ((axes,) if isinstance(axes, str) else axes)]
    if len(set(used)) < len(used):
        raise UserError(f'config.sharding: {who} uses a mesh axis twice in {path}: {tuple(spec)}')
    for dimension, axes in enumerate(spec):
        pieces = count_shards(axes, mesh, who)
        if shape[dimension] % pieces:
            raise UserError(
                f'config.sharding: {who} cuts dimension {dimension} of {path} {shape} '
                f'over {axes!r}, and {shape[dimension]} does not divide by {pieces}'
            )
