# SPDX-License-Identifier: Apache-2.0
"""Ensembles and sweeps: several members of one experiment trained by one program.

Every member is the experiment with another seed, and optionally other optimizer hyperparameters.
The members are the leading dimension of the state; they share the batch and the step counter. A
member trains exactly as in a run of its own.
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

# The mesh axis that members are sharded over, if the mesh has it.
AXIS = 'ensemble'

# The fields of the state that have a leading dimension for the members.
_STACKED = ('params', 'opt_state', 'collections', 'metrics', 'ema', 'loss_scale', 'health')
# For `jax.vmap`: where a state has that dimension.
_STATE_DIMS = TrainState(**dict.fromkeys(_STACKED, 0), step=None)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The members of an ensemble.

    Attributes:
        seeds: the seed of each member.
        values: hyperparameters of the members, by key path below `config.optimizer`.
        optimizer: returns the optimizer with other values at these key paths.
    """

    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]
    optimizer: Callable[[Mapping[str, Any]], Optimizer]

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.seeds)

    def axis(self, mesh: Mesh) -> str | None:
        """Returns the mesh axis that the members are sharded over, None if the mesh has none.

        Raises:
            UserError: if the number of members is not divisible by the size of the axis.
        """
        axis_size = mesh.shape.get(AXIS)
        if axis_size is None:
            return None
        if self.size % axis_size:
            raise UserError(
                f'config.mesh: {self.size} members (config.ensemble.size) are not divisible by '
                f'the size {axis_size} of mesh axis {AXIS!r}'
            )
        return AXIS

    def describe(self, member: int) -> str:
        """Returns 'seed 3, optimizer.learning_rate 0.1'."""
        values = [f'optimizer.{path} {each[member]:g}' for path, each in self.values.items()]
        return ', '.join([f'seed {self.seeds[member]}', *values])


def member_state(state: TrainState, member: int) -> TrainState:
    """Returns the state of one member of an ensemble, like that of a run of its own.

    Raises:
        UserError: if there is no such member.
    """
    size = jax.tree.leaves(state.metrics.stacked)[0].shape[0]
    if not 0 <= member < size:  # JAX would clamp the index.
        raise UserError(f'member {member}: the ensemble has the members 0 to {size - 1}')
    state = dataclasses.replace(state, metrics=state.metrics.stacked)
    fields = {name: jax.tree.map(lambda x: x[member], getattr(state, name)) for name in _STACKED}
    return dataclasses.replace(state, **fields)


def member_spec(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the shape and sharding of one member's part of a leaf of an ensemble's state."""
    assert isinstance(leaf.sharding, NamedSharding)
    sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def repeat_for_members(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Repeats an array for all members, in the shape and sharding of the ensemble's leaf."""
    # Compiled with the output's sharding, so that no device ever has all copies.
    return jax.jit(jnp.broadcast_to, static_argnums=1, out_shardings=like.sharding)(x, like.shape)


@flax.struct.dataclass
class PerMember(clu.metrics.Metric):
    """A tree of metrics whose arrays have a leading dimension for the members.

    Attributes:
        stacked: tree of arrays (members, ...).
    """

    stacked: Any

    def compute(self) -> list[Any]:
        """Returns the computed values of each member, as trees."""
        size = jax.tree.leaves(self.stacked)[0].shape[0]
        trees = (jax.tree.map(lambda x, i=i: x[i], self.stacked) for i in range(size))
        return [compute_metrics(tree) for tree in trees]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleStep:
    """The train steps of all members as one: see `TrainStep`.

    Attributes:
        member: the step of the first member.
        ensemble: the seeds and hyperparameters of the members.
        axis: mesh axis that the members are sharded over, or None.
    """

    member: TrainStep
    ensemble: Ensemble
    axis: str | None = None

    @classmethod
    def from_step(cls, step: TrainStep, ensemble: Ensemble, mesh: Mesh) -> EnsembleStep:
        """Returns the step of an ensemble's members on a mesh, from that of a single model."""
        first = {path: each[0] for path, each in ensemble.values.items()}
        # `undoes`: a member that diverges keeps its last finite state while the others continue.
        member = step.with_context(seed=ensemble.seeds[0], sweeps=True, undoes=True)
        if first:
            member = member.with_context(optimizer=ensemble.optimizer(first))
        return cls(member=member, ensemble=ensemble, axis=ensemble.axis(mesh))

    @property
    def update(self) -> Callable[[TrainState, Batch], TrainState]:
        """The function to compile: `(state, batch) -> state`."""
        return self._update

    @property
    def task(self) -> TaskRunner:
        """The task of each member."""
        return self.member.task

    @property
    def sweeps(self) -> bool:
        """Whether each step checks all values for non-finite ones."""
        return self.member.sweeps

    def with_context(self, **changes: Any) -> EnsembleStep:
        """Returns the step with changes to the members' context: fields of `StepContext`."""
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
        """Returns the initial state of the first member, variables in boxes of dimension names."""
        return self.member.init_boxed(spec)

    def init(self, spec: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Returns the initial state, from the shapes of a training batch."""

        def init_member(seed: jax.Array, values: dict[str, jax.Array]) -> TrainState:
            return self._member(seed, values).init(spec)

        if self.axis is not None:
            return _wrap_metrics(self._map(init_member, (0, 0))(*self._members()))
        # One after the other: batched matrix decompositions, as of orthogonal initializers, may
        # hang on virtual devices (see `virtual_devices.add_threads`).
        stacked = jax.lax.map(lambda member: init_member(*member), self._members())
        fields = {name: getattr(stacked, name) for name in _STACKED}
        first = jax.tree.map(lambda x: x[0], stacked)
        return _wrap_metrics(dataclasses.replace(first, **fields))

    def restart_optimizer(self, state: TrainState) -> TrainState:
        """Returns the state with everything but the variables initialized from the parameters."""

        def restart_member(
            seed: jax.Array, values: dict[str, jax.Array], state: TrainState
        ) -> TrainState:
            return self._member(seed, values).restart_optimizer(state)

        restart = self._map(restart_member, (0, 0, _STATE_DIMS))
        return _wrap_metrics(restart(*self._members(), _unwrap_metrics(state)))

    def examine(self, state: TrainState) -> Health:
        """Returns the health of each member of a state that training starts from."""
        return jax.vmap(self.member.examine, in_axes=(_STATE_DIMS,))(_unwrap_metrics(state))

    def sweep(self, state: TrainState) -> Health:
        """Returns the health of each member, which every step has checked."""
        assert state.health is not None
        # A copy: JAX would return the input itself, whose buffer the next step deletes.
        return jax.tree.map(jnp.copy, state.health)

    def eval_params(self, state: TrainState) -> Any:
        """Returns the parameters to evaluate, of each member."""
        eval_params = jax.vmap(self.member.eval_params, (_STATE_DIMS,), spmd_axis_name=self.axis)
        return eval_params(dataclasses.replace(state, metrics=None))

    def empty_metrics(self, state: TrainState, batch: Mapping[str, Any]) -> PerMember:
        """Returns empty accumulators for a state and a batch of these shapes."""
        member = jax.eval_shape(lambda s: member_state(s, 0), state)
        empty = self.member.empty_metrics(member, batch)
        size = self.ensemble.size
        return PerMember(jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), empty))

    def _update(self, state: TrainState, batch: Batch) -> TrainState:
        """Returns the state after one step of every member on this batch."""

        def update_member(seed: jax.Array, state: TrainState) -> TrainState:
            # From the state, so that the logged hyperparameters are those that are applied.
            values = hyperparams.read(state.opt_state, self.ensemble.values)
            member = self._member(seed, values)
            # Facts of the first member were derived for its optimizer: replace the transformation.
            if values:
                facts = member.context.facts
                assert facts is not None
                tx = member.context.optimizer.transformation(state.params)
                member = member.with_context(facts=dataclasses.replace(facts, tx=tx))
            return member.update(state, batch)

        seeds, _ = self._members()
        update = self._map(update_member, (0, _STATE_DIMS))
        return _wrap_metrics(update(seeds, _unwrap_metrics(state)))

    def state_specs(self, state: TrainState, mesh: Mesh) -> TrainState:
        """Returns the shapes and shardings of the state of all members from those of one.

        Args:
            state: shapes, dtypes and shardings of a member's state.
            mesh: the device mesh.
        """

        def stack(axis: str | None, tree: Any) -> Any:
            def stack_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
                if axis is not None and axis in jax.tree.leaves(tuple(leaf.sharding.spec)):
                    raise UserError(
                        f'config.sharding: mesh axis {AXIS!r} is reserved for the members '
                        '(config.ensemble); arrays of a member cannot be sharded over it'
                    )
                spec = PartitionSpec(axis, *leaf.sharding.spec)
                shape = (self.ensemble.size, *leaf.shape)
                sharding = NamedSharding(mesh, spec)
                return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

            return jax.tree.map(stack_leaf, tree)

        # Metrics and health are fetched in one transfer, so they are replicated.
        axes = {name: None if name in ('metrics', 'health') else self.axis for name in _STACKED}
        fields = {name: stack(axis, getattr(state, name)) for name, axis in axes.items()}
        return _wrap_metrics(dataclasses.replace(state, **fields))

    def _member(self, seed: Any, values: Mapping[str, Any]) -> TrainStep:
        if not values:
            return self.member.with_context(seed=seed)
        return self.member.with_context(seed=seed, optimizer=self.ensemble.optimizer(values))

    def _members(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        values = {path: jnp.asarray(x, jnp.float32) for path, x in self.ensemble.values.items()}
        return jnp.asarray(self.ensemble.seeds, jnp.int32), values

    def _map(self, function: Callable[..., TrainState], dims: Any) -> Callable[..., TrainState]:
        # `spmd_axis_name` adds the members' axis to sharding constraints within the function.
        return jax.vmap(function, in_axes=dims, out_axes=_STATE_DIMS, spmd_axis_name=self.axis)


def _wrap_metrics(state: TrainState) -> TrainState:
    return dataclasses.replace(state, metrics=PerMember(state.metrics))


def _unwrap_metrics(state: TrainState) -> TrainState:
    return dataclasses.replace(state, metrics=state.metrics.stacked)
