# SPDX-License-Identifier: Apache-2.0
"""Applies device transforms, and finds the input fields that each result depends on."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from trainer.config.errors import UserError
from trainer.input.host_field import HostField, explain_host_fields
from trainer.input.structure import Structure, is_flat
from trainer.modules.rng import Keys
from trainer.tasks.batch import as_plain, view_batch

Transform = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class KeyedTransform:
    """A device transform with a parameter `key` or `training`.

    Attributes:
        function: the transform, `function(batch, key=..., training=...)`.
        stream: the name of its RNG stream.
        takes: which of the parameters 'key' and 'training' it has.
    """

    function: Callable[..., Mapping[str, Any]]
    stream: str
    takes: frozenset[str]

    @classmethod
    def wrap(cls, function: Callable[..., Any], index: int) -> Callable[..., Any]:
        """Returns a device transform of a config; unchanged if it has neither parameter.

        Args:
            function: the transform.
            index: its position among the device transforms, which makes its random numbers its own.
        """
        parameters = parameters_of(function)
        takes = {name for name in ('key', 'training') if name in parameters}
        # A `key` with a default is something else, such as the name of a field.
        if 'key' in takes and parameters['key'].default not in (inspect.Parameter.empty, None):
            takes.remove('key')
        return cls(function, f'device_transforms[{index}]', frozenset(takes)) if takes else function

    def bind(self, keys: Keys | None) -> Transform:
        """Returns the transform of a batch in the step of these keys.

        Raises:
            UserError: if there are none.
        """
        if keys is None:
            raise UserError(
                f'the device transform {self} takes {" and ".join(sorted(self.takes))}, so the '
                'task must be called with a model of the framework, which has the keys of its step'
            )
        given: dict[str, Any] = {}
        # The step's own rule for random keys, so a resumed run draws the same numbers.
        if 'key' in self.takes:
            given['key'] = keys.stream(self.stream)
        if 'training' in self.takes:
            given['training'] = keys.mode == 'train'
        return functools.partial(self.function, **given)

    def __call__(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Raises an error: see `bind`."""
        return self.bind(None)(batch)

    def __str__(self) -> str:
        return str(self.function)


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function by name; none if it has no signature."""
    try:
        return inspect.signature(function).parameters
    except ValueError:  # Functions implemented in C may have none.
        return {}


def apply_transforms(
    transforms: Sequence[Transform],
    fields: Mapping[str, Any],
    hidden: dict[str, Any],
    keys: Keys | None = None,
    structure: Structure | None = None,
) -> tuple[dict[str, Any], Structure | None]:
    """Returns the fields of the batch after all transforms, and their structure.

    Args:
        transforms: device transforms, in the order of their calls.
        fields: arrays (batch, ...).
        hidden: fields that stay on the host; transforms can return them, but not compute with them.
        keys: the random keys of the step; None if no transform needs them.
        structure: tree structure of the batch before the transforms.
    """
    batch = {**fields, **hidden}
    for position, transform in enumerate(transforms):
        name = f'the device transform {transform}'
        bound = transform.bind(keys) if isinstance(transform, KeyedTransform) else transform
        try:
            with explain_host_fields(hidden):
                result: Any = bound(view_batch(structure, batch, name, passing=True))
        except Exception as error:
            error.add_note(f'in device_transforms[{position}] = {transform}')
            raise
        # A transform may change the structure.
        if is_flat(result):
            batch, structure = dict(result), None
        else:
            result = as_plain(result)
            structure = Structure.from_tree(result, name)
            batch = dict(result) if structure is None else structure.flatten(result, name)
    return batch, structure


def field_origins(
    transforms: Sequence[Transform],
    fields: Mapping[str, Any],
    hidden: dict[str, Any],
    keys: Keys | None = None,
    structure: Structure | None = None,
) -> dict[str, frozenset[str]]:
    """Returns for each transformed field the fields of the loader's batch that it depends on.

    Args:
        transforms: device transforms, in the order of their calls.
        fields: arrays, or their shapes.
        hidden: fields that stay on the host.
        keys: the random keys of the step; None if no transform needs them.
        structure: tree structure of the batch before the transforms.
    """

    def run(fields: Mapping[str, Any]) -> dict[str, Any]:
        batch, _ = apply_transforms(transforms, fields, hidden, keys, structure)
        # Host fields are not arrays, and cannot be outputs of a jaxpr.
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
