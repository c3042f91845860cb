# SPDX-License-Identifier: Apache-2.0
"""Ensembles and sweeps: several members of one experiment trained by one program.

Every member is the experiment with another seed, and optionally other optimizer hyperparameters.
The state has all members along a leading dimension; they share the batch and the step counter. A
member trains exactly as it would alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainer.config.errors import UserError
from trainer.ensemble import hyperparams
from trainer.input.host_field import HostFieldSpec
from trainer.step.context import Batch
from trainer.step.health import Health
from trainer.step.one_model import TrainStep
from trainer.step.optimizer import Optimizer
from trainer.step.state import TrainState
from trainer.tasks.runner import TaskRunner, compute_metrics

# The mesh axis that members are spread over, where a mesh has it.
AXIS = 'ensemble'

# The fields of the state that have the dimension of the members.
_PARTS = ('params', 'opt_state', 'collections', 'metrics', 'ema', 'loss_scale', 'health')
_DIMS = TrainState(**dict.fromkeys(_PARTS, 0), step=None)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The members of an ensemble.

    Attributes:
        seeds: the seed of each member.
        values: the values of the members by key path below `config.optimizer`.
        optimizer: returns the optimizer with other values at these paths.
    """

    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]
    optimizer: Callable[[Mapping[str, Any]], Optimizer]

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.seeds)

    def axis(self, mesh: Mesh) -> str | None:
        """Returns the mesh axis that the members are spread over, None if the mesh has none.

        Raises:
            UserError: if they do not divide over it.
        """
        parts = mesh.shape.get(AXIS)
        if parts is None:
            return None
        if self.size % parts:
            raise UserError(
                f'config.mesh: {self.size} members (config.ensemble.size) do not divide over the '
                f'{parts} devices of the axis {AXIS!r}'
            )
        return AXIS

    def describe(self, member: int) -> str:
        """Returns 'seed 3, optimizer.learning_rate 0.1'."""
        values = [f'optimizer.{path} {each[member]:g}' for path, each in self.values.items()]
        return ', '.join([f'seed {self.seeds[member]}', *values])


def member_state(state: TrainState, member: int) -> TrainState:
    """Returns one member's part of an ensemble's state: a state as it would be alone.

    Raises:
        UserError: if there is no such member.
    """
    size = jax.tree.leaves(state.metrics.stacked)[0].shape[0]
    if not 0 <= member < size:  # JAX would take the nearest.
        raise UserError(f'member {member}: the ensemble has the members 0 to {size - 1}')
    state = dataclasses.replace(state, metrics=state.metrics.stacked)
    parts = {name: jax.tree.map(lambda x: x[member], getattr(state, name)) for name in _PARTS}
    return dataclasses.replace(state, **parts)


def member_spec(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns shape and sharding of one member's part of a leaf of an ensemble's state."""
    assert isinstance(leaf.sharding, NamedSharding)
    sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def repeat_for_members(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array that every member has, in the shape and sharding of the ensemble's leaf."""
    return jax.jit(jnp.broadcast_to, static_argnums=1, out_shardings=like.sharding)(x, like.shape)


@flax.struct.dataclass
class PerMember(clu.metrics.Metric):
    """A tree of metrics, each of whose numbers has a dimension for the members before all others.

    Attributes:
        stacked: the tree.
    """

    stacked: Any

    def compute(self) -> list[Any]:
        """Returns the tree of computed values of each member."""
        size = jax.tree.leaves(self.stacked)[0].shape[0]
        trees = (jax.tree.map(lambda x, i=i: x[i], self.stacked) for i in range(size))
        return [compute_metrics(tree) for tree in trees]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleStep:
    """The train steps of all members as one: see `TrainStep`.

    Attributes:
        member: the step of the first member.
        ensemble: who they are.
        axis: mesh axis that the members are spread over, or None.
    """

    member: TrainStep
    ensemble: Ensemble
    axis: str | None = None

    @classmethod
    def from_step(cls, step: TrainStep, ensemble: Ensemble, mesh: Mesh) -> EnsembleStep:
        """Returns the step of an ensemble's members on a mesh, from that of a lone model."""
        first = {path: each[0] for path, each in ensemble.values.items()}
        # A member that diverges keeps its last state; the others continue, and it is evaluated with
        # them.
        member = step.with_context(seed=ensemble.seeds[0], sweeps=True, undoes=True)
        if first:
            member = member.with_context(optimizer=ensemble.optimizer(first))
        return cls(member=member, ensemble=ensemble, axis=ensemble.axis(mesh))

    @property
    def update(self) -> Callable[[TrainState, Batch], TrainState]:
        """What is compiled: `(state, batch) -> state`."""
        return self._update

    @property
    def task(self) -> TaskRunner:
        """What each member is asked to do with a batch."""
        return self.member.task

    @property
    def sweeps(self) -> bool:
        """Whether each step looks at all values for what is not finite."""
        return self.member.sweeps

    def with_context(self, **changes: Any) -> EnsembleStep:
        """Returns the step with another context of its members: fields of `StepContext`."""
        return dataclasses.replace(self, member=self.member.with_context(**changes))

    def with_fields(
        self, kept: Sequence[HostFieldSpec], is_weighted: bool | None = None
    ) -> EnsembleStep:
        """Returns the step for batches with fields that stay on the host."""
        return dataclasses.replace(self, member=self.member.with_fields(kept, is_weighted))

    def with_state(self, state: TrainState, replicated: Any = None) -> EnsembleStep:
        """Returns the step for members whose states have this structure: see `TrainStep`."""
        return dataclasses.replace(self, member=self.member.with_state(state, replicated))

    def init_boxed(self, spec: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Returns the first state of the first member, variables in the boxes that name them."""
        return self.member.init_boxed(spec)

    def init(self, spec: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Returns the first state, from the shapes of a training batch."""

        def one(seed: jax.Array, values: dict[str, jax.Array]) -> TrainState:
            return self._member(seed, values).init(spec)

        return _wrap_metrics(self._map(one, (0, 0))(*self._members()))

    def restart_optimizer(self, state: TrainState) -> TrainState:
        """Returns the state with the rest of it as its parameters start them."""

        def one(seed: jax.Array, values: dict[str, jax.Array], state: TrainState) -> TrainState:
            return self._member(seed, values).restart_optimizer(state)

        return _wrap_metrics(
            self._map(one, (0, 0, _DIMS))(*self._members(), _unwrap_metrics(state))
        )

    def examine(self, state: TrainState) -> Health:
        """Returns the health of each member of a state that training starts from."""
        return jax.vmap(self.member.examine, in_axes=(_DIMS,))(_unwrap_metrics(state))

    def sweep(self, state: TrainState) -> Health:
        """Returns the health of each member, which every step has checked."""
        assert state.health is not None
        return jax.tree.map(jnp.copy, state.health)

    def eval_params(self, state: TrainState) -> Any:
        """Returns the parameters of each member that are evaluated."""
        evaluated = jax.vmap(self.member.eval_params, (_DIMS,), spmd_axis_name=self.axis)
        return evaluated(dataclasses.replace(state, metrics=None))

    def empty_metrics(self, state: TrainState, batch: Mapping[str, Any]) -> PerMember:
        """Returns accumulators that have seen nothing, on the shapes of this state and batch."""
        alone = jax.eval_shape(lambda s: member_state(s, 0), state)
        empty = self.member.empty_metrics(alone, batch)
        size = self.ensemble.size
        return PerMember(jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), empty))

    def _update(self, state: TrainState, batch: Batch) -> TrainState:
        """Returns the state after one step of every member on this batch."""

        def one(seed: jax.Array, state: TrainState) -> TrainState:
            # As the state has them: what an optimizer logs is what it does.
            values = hyperparams.read(state.opt_state, self.ensemble.values)
            member = self._member(seed, values)
            if values:  # The optimizer is another one, and so is its transformation.
                facts = member.context.facts
                assert facts is not None
                tx = member.context.optimizer.transformation(state.params)
                member = member.with_context(facts=dataclasses.replace(facts, tx=tx))
            return member.update(state, batch)

        seeds, _ = self._members()
        return _wrap_metrics(self._map(one, (0, _DIMS))(seeds, _unwrap_metrics(state)))

    def state_specs(self, alone: TrainState, mesh: Mesh) -> TrainState:
        """Returns the shapes and shardings of all members' state from those of one.

        Args:
            alone: shapes, dtypes and shardings.
            mesh: the device mesh.
        """

        def stack(axis: str | None, tree: Any) -> Any:
            def one(leaf: Any) -> jax.ShapeDtypeStruct:
                if axis is not None and axis in jax.tree.leaves(tuple(leaf.sharding.spec)):
                    raise UserError(
                        f'config.sharding: the mesh axis {AXIS!r} is that of the members '
                        '(config.ensemble), so nothing of a member can be cut over it'
                    )
                spec = PartitionSpec(axis, *leaf.sharding.spec)
                shape = (self.ensemble.size, *leaf.shape)
                sharding = NamedSharding(mesh, spec)
                return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

            return jax.tree.map(one, tree)

        # Metrics and health are fetched in one piece, so they are replicated.
        axes = {name: None if name in ('metrics', 'health') else self.axis for name in _PARTS}
        parts = {name: stack(axis, getattr(alone, name)) for name, axis in axes.items()}
        return _wrap_metrics(dataclasses.replace(alone, **parts))

    def _member(self, seed: Any, values: Mapping[str, Any]) -> TrainStep:
        if not values:
            return self.member.with_context(seed=seed)
        return self.member.with_context(seed=seed, optimizer=self.ensemble.optimizer(values))

    def _members(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        values = {path: jnp.asarray(x, jnp.float32) for path, x in self.ensemble.values.items()}
        return jnp.asarray(self.ensemble.seeds, jnp.int32), values

    def _map(self, one: Callable[..., TrainState], dims: Any) -> Callable[..., TrainState]:
        return jax.vmap(one, in_axes=dims, out_axes=_DIMS, spmd_axis_name=self.axis)


def _wrap_metrics(state: TrainState) -> TrainState:
    return dataclasses.replace(state, metrics=PerMember(state.metrics))


def _unwrap_metrics(state: TrainState) -> TrainState:
    return dataclasses.replace(state, metrics=state.metrics.stacked)
