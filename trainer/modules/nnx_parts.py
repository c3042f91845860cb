# SPDX-License-Identifier: Apache-2.0
"""Splits an NNX module into its graph, and its variables as nested dicts by collection."""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from trainer import compat
from trainer.config.errors import UserError

Variables = Mapping[str, Any]
Path = tuple[str, ...]

# Variables that last for one call only, and are not part of the state.
INTERMEDIATES = (nnx.Intermediate, nnx.Perturbation)
# The names that Linen gives to collections of the same meaning.
_NAMES = {nnx.Param: 'params', nnx.BatchStat: 'batch_stats', nnx.Cache: 'cache'}
# The collection of arrays that are in no variable.
_BUFFERS = 'buffers'
# What is kept under each name that no class of a user's own may take.
_RESERVED = {
    **{name: f'nnx.{kind.__name__}' for kind, name in _NAMES.items()},
    _BUFFERS: 'arrays in no variable',
    'intermediates': 'nnx.Intermediate',
    'perturbations': 'nnx.Perturbation',
}


@dataclasses.dataclass(frozen=True)
class SplitModule:
    """A module without the values of its variables.

    Attributes:
        graph: what never changes.
        state: its variables; their values are shapes.
    """

    graph: Any
    state: Any

    @classmethod
    def from_module(cls, module: nnx.Module) -> SplitModule:
        """Takes a module apart, made with values or with shapes alone."""
        graph, state = nnx.split(module)
        return cls(graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))

    def fill(self, variables: Variables, rng: Callable[[Path, Any], jax.Array]) -> nnx.Module:
        """Returns the module with these variables.

        Args:
            variables: nested dicts by collection.
            rng: makes the value of a variable of random numbers, by its path.
        """
        filled = []
        for path, variable in nnx.to_flat_state(self.state):
            place = tuple(map(str, path))
            if isinstance(variable, nnx.RngState):
                value = rng(place, variable)
            elif isinstance(variable, INTERMEDIATES):
                shapes = variable.get_value()
                value = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            else:
                value = functools.reduce(
                    operator.getitem, place, variables[collection_name(variable)]
                )
            is_variable = isinstance(variable, nnx.Variable)
            filled.append((path, variable.replace(value) if is_variable else value))
        return nnx.merge(self.graph, nnx.from_flat_state(filled), copy=True)


def variable_values(module: nnx.Module, *, boxed: bool = False) -> dict[str, Any]:
    """Returns the values of a module's variables as nested dicts, by collection.

    Args:
        module: keeps what it has; random numbers and intermediates are left out.
        boxed: put those whose dimensions have names into Linen's boxes (`flax.core.meta`).
    """
    mark_arrays(module)
    found: dict[str, dict[Path, Any]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if isinstance(variable, (nnx.RngState, *INTERMEDIATES)):
            continue
        value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        if boxed and isinstance(variable, nnx.Variable):
            names = compat.dimension_names(variable)
            value = value if names is None else nn.LogicallyPartitioned(value, tuple(names))
        found.setdefault(collection_name(variable), {})[tuple(map(str, path))] = value
    return {name: traverse_util.unflatten_dict(flat) for name, flat in found.items()}


def merge_variables(below: Variables, above: Variables) -> dict[str, Any]:
    """Merges two trees of variables; values of `above` take precedence."""
    flat = {**traverse_util.flatten_dict(below), **traverse_util.flatten_dict(above)}
    return traverse_util.unflatten_dict(flat)


def collection_name(variable: Any) -> str:
    """Returns the name under which the variables of a class are kept.

    Raises:
        UserError: for a class whose name in snake case is that of another kind.
    """
    if not isinstance(variable, nnx.Variable):
        return _BUFFERS
    kind = type(variable)
    for known, name in _NAMES.items():
        if issubclass(kind, known):
            return name
    name = re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', kind.__name__).lower()
    if name in _RESERVED:
        raise UserError(
            f'config.model: the variables of the class {kind.__module__}.{kind.__qualname__} would '
            f'be kept as {name!r}, which is the name of {_RESERVED[name]}. Derive the class from '
            'that if it is meant, or give it another name'
        )
    return name


def mark_arrays(module: nnx.Module) -> None:
    """Marks bare arrays as data, because NNX treats traced ones as a part of the graph."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Pytree):
            for name, value in list(vars(node).items()):
                if isinstance(value, jax.core.Tracer) and not nnx.is_data(value):
                    setattr(node, name, nnx.data(value))
