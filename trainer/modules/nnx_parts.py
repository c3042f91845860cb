# SPDX-License-Identifier: Apache-2.0
"""Splits NNX modules into their graphs and their variables, as nested dicts by collection."""

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

# Variables that exist during one call and are not part of the state.
INTERMEDIATES = (nnx.Intermediate, nnx.Perturbation)
# Linen's names for collections of the same meaning.
_NAMES = {nnx.Param: 'params', nnx.BatchStat: 'batch_stats', nnx.Cache: 'cache'}
# The collection of arrays that are not in a variable.
_BUFFERS = 'buffers'
# Collection names that are not available to other variable classes, and what they are used for.
_RESERVED = {
    **{name: f'nnx.{kind.__name__}' for kind, name in _NAMES.items()},
    _BUFFERS: 'arrays outside of variables',
    'intermediates': 'nnx.Intermediate',
    'perturbations': 'nnx.Perturbation',
}


@dataclasses.dataclass(frozen=True)
class SplitModule:
    """A module without the values of its variables.

    Attributes:
        graph: the NNX graph definition, which is static.
        state: its variables, with shapes and dtypes instead of values.
    """

    graph: Any
    state: Any

    @classmethod
    def from_module(cls, module: nnx.Module) -> SplitModule:
        """Splits a module whose variables have values or only shapes."""
        graph, state = nnx.split(module)
        return cls(graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))

    def fill(self, variables: Variables, rng: Callable[[Path, Any], jax.Array]) -> nnx.Module:
        """Returns a new module with these variables.

        Args:
            variables: nested dicts by collection.
            rng: called as `rng(path, variable)`; returns the value of a variable of RNG state.
        """
        filled = []
        for path, variable in nnx.to_flat_state(self.state):
            # As strings, because indices of lists are integers and keys of checkpoints are not.
            names = tuple(map(str, path))
            if isinstance(variable, nnx.RngState):
                value = rng(names, variable)
            elif isinstance(variable, INTERMEDIATES):
                shapes = variable.get_value()
                value = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            else:
                tree = variables[collection_name(variable)]
                value = functools.reduce(operator.getitem, names, tree)
            is_variable = isinstance(variable, nnx.Variable)
            filled.append((path, variable.replace(value) if is_variable else value))
        # A copy, because a call changes its variables in place.
        return nnx.merge(self.graph, nnx.from_flat_state(filled), copy=True)


def variable_values(module: nnx.Module, *, boxed: bool = False) -> dict[str, Any]:
    """Returns the values of a module's variables as nested dicts by collection.

    Args:
        module: keeps its variables. RNG state and intermediates are left out of the result.
        boxed: put variables with dimension names into Linen's boxes (`flax.core.meta`).
    """
    mark_arrays(module)
    collections: dict[str, dict[Path, Any]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if isinstance(variable, (nnx.RngState, *INTERMEDIATES)):
            continue
        value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        if boxed and isinstance(variable, nnx.Variable):
            names = compat.dimension_names(variable)
            value = value if names is None else nn.LogicallyPartitioned(value, tuple(names))
        collections.setdefault(collection_name(variable), {})[tuple(map(str, path))] = value
    return {name: traverse_util.unflatten_dict(flat) for name, flat in collections.items()}


def merge_variables(below: Variables, above: Variables) -> dict[str, Any]:
    """Merges two trees of variables; values of `above` take precedence."""
    flat = {**traverse_util.flatten_dict(below), **traverse_util.flatten_dict(above)}
    return traverse_util.unflatten_dict(flat)


def collection_name(variable: Any) -> str:
    """Returns the name of the collection that a variable belongs to.

    Raises:
        UserError: for a class whose name in snake case is reserved for another class.
    """
    if not isinstance(variable, nnx.Variable):
        return _BUFFERS
    kind = type(variable)
    # Subclasses of `nnx.Param` are trained, and so on: they share the collection of their base.
    for known, name in _NAMES.items():
        if issubclass(kind, known):
            return name
    name = re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', kind.__name__).lower()
    if name in _RESERVED:
        raise UserError(
            f'config.model: the variables of the class {kind.__module__}.{kind.__qualname__} would '
            f'be the collection {name!r}, which is reserved for {_RESERVED[name]}. Rename the '
            'class, or derive it from that one if this is intended'
        )
    return name


def mark_arrays(module: nnx.Module) -> None:
    """Marks arrays outside of variables as data: NNX takes traced ones for static attributes."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Pytree):
            for name, value in list(vars(node).items()):
                if isinstance(value, jax.core.Tracer) and not nnx.is_data(value):
                    setattr(node, name, nnx.data(value))
