# SPDX-License-Identifier: Apache-2.0
"""The step of one model and its initial state, in the form that `Programs` compile."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import Mesh

from trainer.input.collected import Collector
from trainer.input.host_field import HostFieldSpec
from trainer.modules.rng import Keys
from trainer.step import (
    collect,
    custom_step,
    ema,
    eval_point,
    objective,
    step_metrics,
    step_sizes,
    sweep,
    views,
)
from trainer.step.context import Batch, StateFacts, StepContext
from trainer.step.health import Health, handles_non_finite
from trainer.step.loss_scale import LossScale
from trainer.step.state import TrainState
from trainer.step.train_step import default_step, train_step, weighted_sums
from trainer.tasks.batch import record_reads
from trainer.tasks.runner import TaskRunner


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A step as a pure function `(state, batch) -> state`, and its initial state.

    Attributes:
        context: the parts of the step and its settings.
        function: the step function: that of `config.step`, or `default_step`.
        collector: the source, if it makes its batches with the model.
    """

    context: StepContext
    function: Callable[..., Any] = default_step
    collector: Collector | None = None

    @property
    def update(self) -> Callable[[TrainState, Batch], TrainState]:
        """The function to compile: `(state, batch) -> state`."""
        function = self.function
        if function is not default_step:
            function = functools.partial(custom_step.run, function=function)
        step = functools.partial(train_step, ctx=self.context, function=function)
        if self.collector is None:
            return step
        return functools.partial(
            collect.update, collector=self.collector, ctx=self.context, step=step
        )

    @property
    def task(self) -> TaskRunner:
        """The task, which computes the loss of a batch."""
        return self.context.task

    @property
    def sweeps(self) -> bool:
        """Whether each step checks all values for non-finite ones."""
        return self.context.sweeps

    def with_context(self, **changes: Any) -> TrainStep:
        """Returns the step with another context: `changes` are fields of `StepContext`."""
        return dataclasses.replace(self, context=dataclasses.replace(self.context, **changes))

    def with_fields(
        self, kept: Sequence[HostFieldSpec], is_weighted: bool | None = None
    ) -> TrainStep:
        """Returns the step for batches with fields that stay on the host."""
        return self.with_context(task=self.task.with_host_fields(kept, is_weighted))

    def with_state(self, state: TrainState, replicated: Any = None) -> TrainStep:
        """Returns the step for states with this structure.

        Args:
            state: arrays or their shapes.
            replicated: tree of bools: whether every device has all of a parameter; None if unknown.
        """
        optimizer, opt_state = self.context.optimizer, state.opt_state
        # Once per run and not in the step: each needs the whole tree, and a step is traced often.
        facts = StateFacts(
            tx=optimizer.transformation(state.params),
            frozen=optimizer.frozen_mask(state.params),
            replicated=replicated,
            all_replicated=replicated is not None and all(jax.tree.leaves(replicated)),
            handles_non_finite=handles_non_finite(opt_state),
            scales_rates=bool(step_sizes.factors(opt_state)),
            needs_extra_arguments=objective.needs_extra_arguments(optimizer.losses, opt_state),
        )
        return self.with_context(facts=facts)

    def state_specs(self, state: TrainState, mesh: Mesh) -> TrainState:
        """Returns the shapes and shardings of the state: those of one model, unchanged."""
        return state

    def init(self, spec: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Returns the first state, from the shapes of a training batch."""
        return meta.unbox(self.init_boxed(spec))

    def init_boxed(self, spec: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Returns the first state, with variables in the boxes that name their dimensions."""
        context, optimizer = self.context, self.context.optimizer
        optimizer.check_learning_rates()
        # The values do not matter: the compiler removes the forward pass of initialization.
        batch = {name: jnp.zeros(s.shape, s.dtype) for name, s in spec.items()}
        # In a record of its own: a field that is read only for initialization is not sent in steps.
        with record_reads():
            # The mode is folded into the keys, so that no parameter shares its random numbers with
            # dropout of a step.
            keys = Keys(seed=context.seed, mode='init')
            prepared = self.task.prepare_batch(batch, keys)
            variables = dict(context.model.init(self.task.task, prepared, keys))
        views.check_arrays(meta.unbox(variables))
        named = variables.pop('params')
        optimizer.check_statistics(meta.unbox(variables))
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=meta.unbox(named),
            opt_state=None,
            collections=variables,
            metrics=None,
            loss_scale=None
            if context.loss_scale is None
            else LossScale.from_value(context.loss_scale),
        )
        state = self.restart_optimizer(state)
        # Last, because the metrics of a step depend on all other parts of the state.
        metrics = self.empty_metrics(meta.unbox(state), batch)
        carry = None
        if self.collector is not None:
            carry = collect.init(self.collector, spec, context.seed)
        return dataclasses.replace(state, params=named, metrics=metrics, carry=carry)

    def restart_optimizer(self, state: TrainState) -> TrainState:
        """Returns the state with a new optimizer state and moving average.

        It has to be called after every change of the parameters outside of a step, because some
        optimizers keep a copy of them.
        """
        params = state.params
        opt_state = self.context.optimizer.transformation(params).init(params)
        return dataclasses.replace(
            state,
            opt_state=opt_state,
            ema=None if self.context.ema_decay is None else ema.init(params),
            health=Health.from_finite(params, opt_state) if self.context.tracks_health else None,
        )

    def examine(self, state: TrainState) -> Health:
        """Returns the health of a state that training starts from."""
        return Health.from_arrays(state.params, state.opt_state)

    def sweep(self, state: TrainState) -> Health:
        """Returns the health of a state; checks its parameters and slots if updates can stop."""
        if not self.context.stops:
            # A copy: JAX would return the input itself, whose buffer the next step deletes.
            return jax.tree.map(jnp.copy, state.health)
        return sweep.check(state, self.context)

    def eval_params(self, state: TrainState) -> Any:
        """Returns the parameters that are evaluated: see `config.optimizer.eval_params`."""
        return eval_point.compute_eval_params(self.context.optimizer, state.params, state.opt_state)

    def empty_metrics(self, state: TrainState, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns empty accumulators for the shapes of this state and batch."""
        # A state in initialization has no metrics yet; a later one must lead to the same trace.
        state = dataclasses.replace(state, metrics=None)
        context = self.with_state(state).context
        if self.function is default_step:
            output = step_metrics.output_shapes(weighted_sums, state, batch, context)
            return step_metrics.empty_metrics(output, state, context)
        with contextlib.suppress(Exception):
            # Captures and the guard run the task even if the custom step does not, so its fields
            # must be recorded as read. Errors of the task do not matter here.
            output = step_metrics.output_shapes(weighted_sums, state, batch, context)
            step_metrics.empty_task_metrics(output, self.task)
        # A new function object: with a cached trace, no reads would be recorded.
        run = functools.partial(custom_step.run, ctx=context, function=self.function)
        shapes = jax.eval_shape(lambda s, b: run(s, b), state, batch)
        return custom_step.empty_like(shapes[1])
