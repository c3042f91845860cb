# SPDX-License-Identifier: Apache-2.0
"""Rules that decide over which mesh axes each parameter is sharded.

`config.sharding` is a list of rules. For each parameter, the first rule that returns a spec
decides. A parameter without a spec is sharded as its model declares with `nn.with_partitioning`,
and otherwise replicated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
from jax.sharding import Mesh, PartitionSpec

from trainer.modules.model_view import param_path
from trainer.modules.patterns import check_used
from trainer.parallel import sharding_checks
from trainer.parallel.sharding_checks import Axes


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter as a rule sees it.

    Attributes:
        path: 'Dense_0/kernel'.
        shape: size of each dimension.
        itemsize: bytes of an element.
        names: the logical name of each dimension, or None if the model gives none.
    """

    path: str
    shape: tuple[int, ...]
    itemsize: int
    names: tuple[str | None, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the whole array in bytes."""
        return math.prod(self.shape) * self.itemsize


class Rule(Protocol):
    """One entry of `config.sharding`."""

    def __call__(self, parameter: Parameter, mesh: Mesh) -> PartitionSpec | None:
        """Returns the parameter's spec, or None to leave it to the next rule."""


@dataclasses.dataclass(frozen=True)
class Replicated:
    """Replicates every parameter."""

    def __call__(self, parameter: Parameter, mesh: Mesh) -> PartitionSpec:
        """Returns the empty spec."""
        del parameter, mesh
        return PartitionSpec()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FSDP:
    """Fully sharded data parallelism: shards the largest dimension that is divisible by the axis.

    A parameter that is small or has no such dimension is left to the next rule; without another
    rule it is replicated.

    Attributes:
        axis: mesh axis, or several used together.
        min_bytes: smaller parameters are not sharded: gathering them costs more than it saves.
    """

    axis: str | tuple[str, ...] = 'fsdp'
    min_bytes: int = 2**16

    def __call__(self, parameter: Parameter, mesh: Mesh) -> PartitionSpec | None:
        """Returns a spec with one sharded dimension, or None."""
        shards = sharding_checks.count_shards(self.axis, mesh, 'FSDP')
        fits = [size % shards == 0 and size > 0 for size in parameter.shape]
        if parameter.nbytes < self.min_bytes or not any(fits):
            return None
        sizes = [size if fit else 0 for size, fit in zip(parameter.shape, fits, strict=True)]
        # Of equal dimensions the last one: usually that of the outputs.
        largest = max(range(len(sizes)), key=lambda i: (sizes[i], i))
        return PartitionSpec(*(self.axis if i == largest else None for i in range(largest + 1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByPath:
    """Specs by regular expressions on parameter paths, for manual tensor parallelism.

    Attributes:
        rules: (pattern, axes) pairs; the first pattern that matches the whole path decides. `axes`
            has an entry for each dimension: a mesh axis, a tuple of them, or None.

    Raises:
        UserError: for an invalid pattern, or axes that are not a sequence.
    """

    rules: Sequence[tuple[str, Sequence[Axes]]]

    def __post_init__(self) -> None:
        sharding_checks.check_patterns(self.rules)

    def __call__(self, parameter: Parameter, mesh: Mesh) -> PartitionSpec | None:
        """Returns the spec of the first pattern that matches, or None."""
        for pattern, axes in self.rules:
            if re.fullmatch(pattern, parameter.path):
                spec = PartitionSpec(*_as_axes(axes))
                sharding_checks.check_spec(
                    parameter.path, parameter.shape, spec, mesh, f'the pattern {pattern!r}'
                )
                return spec
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByName:
    """Specs by the names that the model gives to dimensions ('embed', 'mlp').

    Linen modules name them with `nn.with_logical_partitioning`. Each mesh axis is used at most once
    per array, by the first rule that applies; a dimension whose name has no rule is not sharded.
    Activations that the model names with `nn.with_logical_constraint` follow the same rules.

    Attributes:
        rules: (name, axes) pairs in order of precedence; a name may occur more than once.
    """

    rules: Sequence[tuple[str, Axes]]

    def __post_init__(self) -> None:
        sharding_checks.check_pairs(self.rules)

    def __call__(self, parameter: Parameter, mesh: Mesh) -> PartitionSpec | None:
        """Returns the spec of a parameter whose dimensions have names, None for any other."""
        if parameter.names is None:
            return None
        spec = nn.logical_to_mesh_axes(parameter.names, self.logical_rules)
        assert spec is not None
        sharding_checks.check_spec(
            parameter.path, parameter.shape, spec, mesh, f'the names {parameter.names}'
        )
        return spec

    @property
    def logical_rules(self) -> tuple[tuple[str, Axes], ...]:
        """The rules in Flax's format."""
        return tuple((name, _as_axes([axes])[0]) for name, axes in self.rules)


BUILT_IN: dict[str, Rule] = {'replicated': Replicated(), 'fsdp': FSDP()}


def choose_spec(parameter: Parameter, rules: Iterable[Rule], mesh: Mesh) -> PartitionSpec:
    """Returns the spec of the first rule that has one.

    Without one, a parameter whose dimensions are named after mesh axes is sharded over those, and
    any other is replicated.

    Raises:
        UserError: if a rule names an axis that the mesh does not have, or the size of a dimension
            is not divisible by its axes.
    """
    for rule in rules:
        spec = rule(parameter, mesh)
        if spec is not None:
            sharding_checks.check_spec(
                parameter.path, parameter.shape, spec, mesh, type(rule).__name__
            )
            return spec
    # Names of mesh axes come from `nn.with_partitioning`. Logical names without rules are ignored.
    names = parameter.names or ()
    if not all(name is None or name in mesh.shape for name in names):
        return PartitionSpec()
    spec = PartitionSpec(*names)
    sharding_checks.check_spec(parameter.path, parameter.shape, spec, mesh, 'the model')
    return spec


def check_rules(rules: Iterable[Rule], mesh: Mesh) -> None:
    """Checks that the mesh has all axes that the rules name, even if no parameter uses them.

    Raises:
        UserError: naming the rule and the axis.
    """
    for rule in rules:
        if isinstance(rule, ByPath):
            for pattern, axes in rule.rules:
                for each in _as_axes(axes):
                    sharding_checks.count_shards(each, mesh, f'the pattern {pattern!r}')
        elif isinstance(rule, ByName):
            for name, each in rule.logical_rules:
                sharding_checks.count_shards(each, mesh, f'the rule for {name!r}')


def param_specs(params: Any, names: Any, rules: Sequence[Rule], mesh: Mesh) -> Any:
    """Returns the spec of each parameter.

    Args:
        params: tree of shapes and dtypes.
        names: the same tree of `PartitionSpec`s of logical names, empty where there are none.
        rules: sharding rules, in order of precedence.
        mesh: the device mesh.

    Raises:
        UserError: as `choose_spec`, and for a pattern that matches no parameter.
    """
    paths = [param_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for rule in rules:
        if isinstance(rule, ByPath):  # A pattern that matches nothing is probably a typo.
            check_used([pattern for pattern, _ in rule.rules], paths, 'config.sharding')

    def find(path: tuple[Any, ...], leaf: Any, named: PartitionSpec | None) -> PartitionSpec:
        parameter = Parameter(
            path=param_path(path),
            shape=tuple(leaf.shape),
            itemsize=leaf.dtype.itemsize,
            # Without names if the metadata of the parameter's box is not about sharding.
            names=tuple(named or ()) or None,
        )
        return choose_spec(parameter, rules, mesh)

    return jax.tree_util.tree_map_with_path(find, params, names)


def logical_rules(rules: Iterable[Rule]) -> tuple[tuple[str, Axes], ...]:
    """Returns the pairs of all `ByName` rules, in order; activations follow them."""
    return tuple(pair for rule in rules if isinstance(rule, ByName) for pair in rule.logical_rules)


@contextlib.contextmanager
def named_axes(rules: Iterable[Rule], mesh: Mesh) -> Iterator[None]:
    """While tracing inside, activations may name mesh axes, or dimensions that have rules."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules(rules)):
        yield


def _as_axes(axes: Sequence[Any]) -> tuple[Axes, ...]:
    return tuple(tuple(a) if isinstance(a, (list, tuple)) else a for a in axes)
