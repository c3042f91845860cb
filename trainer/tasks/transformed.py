# SPDX-License-Identifier: Apache-2.0
"""Applies device transforms, and finds the fields that their results depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from trainer.input.host_field import HostField, explain_host_fields
from trainer.tasks.batch import Batch

Transform = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def apply_transforms(
    transforms: Sequence[Transform], fields: Mapping[str, Any], hidden: dict[str, Any]
) -> dict[str, Any]:
    """Returns the batch after all transforms.

    Args:
        transforms: run in this order.
        fields: arrays (rows, ...).
        hidden: fields that stay on the host, which transforms can only pass on.
    """
    seen: Mapping[str, Any] = {**fields, **hidden}
    for transform in transforms:
        with explain_host_fields(hidden):
            seen = transform(Batch(seen, f'the device transform {transform}', passing=True))
    return dict(seen)


def field_origins(
    transforms: Sequence[Transform], fields: Mapping[str, Any], hidden: dict[str, Any]
) -> dict[str, frozenset[str]]:
    """Returns for each transformed field the fields of the loader's batch that it depends on.

    Args:
        transforms: run in this order.
        fields: arrays, or their shapes.
        hidden: fields that stay on the host.
    """

    def run(fields: Mapping[str, Any]) -> dict[str, Any]:
        made = apply_transforms(transforms, fields, hidden)
        return {name: x for name, x in made.items() if not isinstance(x, HostField)}

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in fields.items()}
    closed, outputs = jax.make_jaxpr(run, return_shape=True)(shapes)
    nothing: frozenset[str] = frozenset()
    named = zip(closed.jaxpr.invars, sorted(fields), strict=True)
    of = {id(x): frozenset({name}) for x, name in named}
    for equation in closed.jaxpr.eqns:
        mixed = nothing.union(*(of.get(id(x), nothing) for x in equation.invars))
        of.update({id(x): mixed for x in equation.outvars})
    origins: dict[str, frozenset[str]] = {}
    paths = jax.tree_util.tree_leaves_with_path(outputs)
    for (path, _), x in zip(paths, closed.jaxpr.outvars, strict=True):
        name = path[0].key
        origins[name] = origins.get(name, nothing) | of.get(id(x), nothing)
    return origins
