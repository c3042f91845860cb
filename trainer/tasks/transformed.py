# SPDX-License-Identifier: Apache-2.0
"""Applies device transforms, and finds the input fields that each result depends on."""

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
        transforms: the transforms, in order.
        fields: arrays (batch, ...).
        hidden: fields that stay on the host; transforms can return them, but not compute with them.
    """
    batch: Mapping[str, Any] = {**fields, **hidden}
    for transform in transforms:
        with explain_host_fields(hidden):
            batch = transform(Batch(batch, f'the device transform {transform}', passing=True))
    return dict(batch)


def field_origins(
    transforms: Sequence[Transform], fields: Mapping[str, Any], hidden: dict[str, Any]
) -> dict[str, frozenset[str]]:
    """Returns for each transformed field the fields of the loader's batch that it depends on.

    Args:
        transforms: the transforms, in order.
        fields: arrays, or their shapes.
        hidden: fields that stay on the host.
    """

    def run(fields: Mapping[str, Any]) -> dict[str, Any]:
        batch = apply_transforms(transforms, fields, hidden)
        # Host fields are no arrays, and cannot be outputs of a jaxpr.
        return {name: x for name, x in batch.items() if not isinstance(x, HostField)}

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in fields.items()}
    closed, outputs = jax.make_jaxpr(run, return_shape=True)(shapes)
    nothing: frozenset[str] = frozenset()
    # JAX flattens a dict in the order of its sorted keys.
    named = zip(closed.jaxpr.invars, sorted(fields), strict=True)
    sources = {id(x): frozenset({name}) for x, name in named}
    # Forward through the equations: each output depends on all inputs of its equation. Constants
    # have no entry, because they depend on no field.
    for equation in closed.jaxpr.eqns:
        mixed = nothing.union(*(sources.get(id(x), nothing) for x in equation.invars))
        sources.update({id(x): mixed for x in equation.outvars})
    origins: dict[str, frozenset[str]] = {}
    paths = jax.tree_util.tree_leaves_with_path(outputs)
    # A field can be a pytree of several arrays.
    for (path, _), x in zip(paths, closed.jaxpr.outvars, strict=True):
        name = path[0].key
        origins[name] = origins.get(name, nothing) | sources.get(id(x), nothing)
    return origins
