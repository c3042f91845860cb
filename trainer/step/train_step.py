# SPDX-License-Identifier: Apache-2.0
"""The train step: one batch in, one update out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from trainer.config.durations import Periodic
from trainer.modules.functional import Functional
from trainer.modules.precision import at_least_float32
from trainer.modules.rng import Keys
from trainer.step import eval_point, views
from trainer.step.context import StepContext, StepFunction, checked, default_step, empty_like
from trainer.step.gradients import Gradients
from trainer.step.health import (
    SIGNS,
    Health,
    Signs,
    all_finite,
    check_gradients,
    check_labels,
    check_signs,
    check_state,
    signs_of,
    unless_bad,
    watch,
)
from trainer.step.loss_scale import LossScale, choose
from trainer.step.norms import norms
from trainer.step.objective import Objective, updated
from trainer.step.optimizer import Optimizer
from trainer.step.state import TrainState
from trainer.step.step_sizes import learning_rates
from trainer.tasks.batch import recording
from trainer.tasks.metrics import Last
from trainer.tasks.runner import TaskRunner, merge_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A step as a pure function `(state, batch) -> state`, and the state that it starts from.

    Attributes:
        model: the model's functional interface.
        task: what the model is asked to do with a batch.
        optimizer: what turns gradients into updates.
        seed: the run's seed.
        function: what happens in a step: `config.step`, or the default.
        accumulate: slices that a batch is cut into, to save memory; the update is the same.
        ema_decay: decay of the moving average of the parameters, or None for no average.
        loss_scale: first value of the dynamic loss scale, or None for none.
        shards: number of devices that a batch's rows are spread over.
        whole: for each parameter whether it is replicated on every device; None: unknown.
        log: when rows are logged; where that is known, norms are computed for those steps only.
        last_step: of the run; its row is logged too.
        watches: whether the state has a `health`, which notes labels out of range.
        stops: whether that also notes what is not finite, and updates stop at either.
        sweeps: whether each step checks all gradients, parameters and slots for that, and slots
            stay as they are once updates have stopped. On a CPU that would cost a third of a small
            model's step. There a step checks its loss, and the trainer checks the rest now and
            then, and before it evaluates or saves a state.
        undoes: whether a non-finite update is undone; the old values are kept until it is checked.
    """

    model: Functional
    task: TaskRunner
    optimizer: Optimizer
    seed: int | jax.Array
    function: StepFunction = default_step
    accumulate: int = 1
    ema_decay: float | None = None
    loss_scale: float | None = None
    shards: int = 1
    whole: Any = None
    log: Periodic | None = None
    last_step: int = 0
    watches: bool = False
    stops: bool = True
    sweeps: bool = False
    undoes: bool = False

    def init(self, spec: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Returns the first state, from the shapes of a training batch."""
        return meta.unbox(self.named_init(spec))

    def named_init(self, spec: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Returns the first state, variables still in the boxes that name their dimensions."""
        self.optimizer.check_learning_rates()
        # Zeros of no consequence: the compiler drops the forward pass, only shapes matter.
        batch = {name: jnp.zeros(s.shape, s.dtype) for name, s in spec.items()}
        with recording():  # Fields read here, from zeros, need not be read in a step.
            seen = self.task.prepared(batch)
            keys = Keys(seed=self.seed, mode='init')
            variables = dict(self.model.init(self.task.task, seen, keys))
        views.check_arrays(meta.unbox(variables))
        named = variables.pop('params')
        self.optimizer.check_statistics(meta.unbox(variables))
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=meta.unbox(named),
            opt_state=None,
            collections=variables,
            metrics=None,
            loss_scale=None if self.loss_scale is None else LossScale.of(self.loss_scale),
        )
        state = self.restarted(state)
        metrics = self.empty_metrics(meta.unbox(state), batch)
        return dataclasses.replace(state, params=named, metrics=metrics)

    def restarted(self, state: TrainState) -> TrainState:
        """Returns the state with optimizer state and moving average as its parameters start them.

        Some optimizers keep a copy of the parameters, so this follows every change of these.
        """
        params = state.params
        opt_state = self.optimizer.transformation(params).init(params)
        return dataclasses.replace(
            state,
            opt_state=opt_state,
            # A copy: two leaves of one donated state must not share a buffer.
            ema=None if self.ema_decay is None else jax.tree.map(_average_of, params),
            health=Health.clean(params, opt_state) if self.watches else None,
        )

    def examine(self, state: TrainState) -> Health:
        """Returns the health of a state that training starts from."""
        return Health.of(state.params, state.opt_state)

    def sweep(self, state: TrainState) -> Health:
        """Returns the health of a state, checking its parameters and slots if updates may stop."""
        if not self.stops:
            return jax.tree.map(jnp.copy, state.health)
        return check_state(state, whole=self._is_whole)

    def eval_params(self, state: TrainState) -> Any:
        """Returns the parameters that are evaluated: see `config.optimizer.eval_params`."""
        return eval_point.evaluated(self.optimizer, state.params, state.opt_state)

    def empty_metrics(self, state: TrainState, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns accumulators that have seen nothing, on the shapes of this state and batch."""
        # The metrics of the state that is being made are not known yet, and not needed.
        state = dataclasses.replace(state, metrics=None)
        if self.function is not default_step:
            with contextlib.suppress(Exception):
                # Captures and the guard run the task, whatever the custom step reads.
                self._gradients.empty_metrics(state, batch)
            # A new function object: with a cached trace, no reads would be recorded.
            shapes = jax.eval_shape(lambda s, b: self._step(s, b), state, batch)
            return empty_like(shapes[1])
        empty = self._gradients.empty_metrics(state, batch)
        del empty[SIGNS]
        empty['norms'] = {name: Last.empty() for name in ('grad', 'param', 'update')}
        rates = functools.partial(learning_rates, self.optimizer)
        known = jax.eval_shape(rates, state.opt_state, state.step)
        empty.update(jax.tree.map(lambda _: Last.empty(), known))
        if state.loss_scale is not None:
            empty.update({name: Last.empty() for name in state.loss_scale.metrics()})
        return empty

    def __call__(self, state: TrainState, batch: Mapping[str, jax.Array]) -> TrainState:
        """Returns the state after one step on this batch."""
        new, metrics = self._step(dataclasses.replace(state, metrics=None), batch)
        return dataclasses.replace(new, metrics=merge_metrics(state.metrics, metrics))

    def _step(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Any]:
        context = StepContext(self, state)
        if self.function is not default_step:
            batch = self.task.whole(batch, 'the function of config.step')
        result = self.function(state, batch, context)
        context.check_used()
        signs: Signs | None = None
        if self.function is default_step:
            new, metrics = result
            signs = metrics.pop(SIGNS)
        else:
            new, metrics, signs = checked(state, result)
        collections = self.optimizer.held(state.collections, new.collections)
        new = dataclasses.replace(new, collections=collections)
        if self.watches and self.function is not default_step:  # Which does so in its update.
            if signs is None:
                signs = self._signs(state, batch, metrics, labels=context.runs_task)
            if self.stops:
                new = watch(state, new, signs, slots=self.sweeps)
            else:
                new = dataclasses.replace(new, health=check_labels(state, signs))
        if self.watches and self.stops and self.sweeps:
            health = self.sweep(new)
            undone = unless_bad(health, new, state) if self.undoes else new
            new = dataclasses.replace(undone, health=health)
        return new, metrics

    def _signs(
        self, state: TrainState, batch: Mapping[str, Any], metrics: Any, *, labels: bool
    ) -> Signs:
        """Returns the signs of a function that has not called `ctx.gradients`.

        Its losses are among its metrics. The labels are those of the task, whose model the compiler
        drops again: their range follows from its shape alone.
        """
        signs = signs_of(metrics)
        if not labels:
            return signs
        found = self._gradients.check_labels(state, batch)
        return dataclasses.replace(signs, label=found.label, value=found.value)

    def update(
        self,
        state: TrainState,
        grads: Any,
        collections: Any,
        signs: Signs | None = None,
        *,
        found: Mapping[str, Any],
        given: Mapping[str, Any],
    ) -> tuple[TrainState, Any]:
        """Returns the state after the optimizer's update, and its norms and learning rates."""
        tx = self.optimizer.transformation(state.params)
        updates, opt_state = updated(tx, grads, state, found, given)
        new = state.apply_updates(updates, opt_state=opt_state, collections=collections)
        if self.ema_decay is not None:
            towards = functools.partial(_towards, share=1.0 - self.ema_decay)
            new = dataclasses.replace(new, ema=jax.tree.map(towards, state.ema, new.params))
        metrics: dict[str, Any] = {}
        # Of the update just made: the schedule counts the updates before it.
        count = state.step
        finite = jnp.ones((), bool)
        if self.sweeps or state.loss_scale is not None:
            finite = all_finite(grads, whole=self._is_whole)
        if (scale := state.loss_scale) is not None:
            count -= scale.skipped
            scale = scale.after(finite)
            skipped = ('params', 'opt_state', 'collections', 'ema')
            new = dataclasses.replace(new.keeping(~finite, state, skipped), loss_scale=scale)
            values = scale.metrics().items()
            metrics.update({name: Last.from_model_output(value) for name, value in values})
            updates = choose(finite, updates, jax.tree.map(jnp.zeros_like, updates))
        if state.health is not None and not self.stops:
            if signs is not None:
                new = dataclasses.replace(new, health=check_labels(state, signs))
        elif state.health is not None:
            health = state.health if signs is None else check_signs(state, signs)
            health = check_gradients(state, health, finite)
            new = unless_bad(health, new, state, slots=self.sweeps)
        metrics['norms'] = self._norms(state, grads, updates, new.params)
        rates = learning_rates(self.optimizer, new.opt_state, count)
        metrics.update(jax.tree.map(Last.from_model_output, rates))
        return new, metrics

    @property
    def _is_whole(self) -> bool:
        return self.whole is not None and all(jax.tree.leaves(self.whole))

    def _norms(self, state: TrainState, grads: Any, updates: Any, params: Any) -> dict[str, Last]:
        """Returns the norms of this update; each row holds those of its own step."""
        due = None
        if self.log is not None and jax.default_backend() == 'cpu':
            # On a CPU reading every parameter three times costs a tenth of a small model's step; on
            # an accelerator a branch would cost more than the norms.
            due = is_due(self.log, state.step + 1) | (state.step + 1 == self.last_step)
        values = norms(
            grads=grads,
            updates=updates,
            old=state.params,
            new=params,
            frozen=self.optimizer.frozen(params),
            whole=self.whole,
            due=due,
        )
        return {name: Last.from_model_output(value) for name, value in values.items()}

    def gradients(
        self, state: TrainState, batch: Mapping[str, jax.Array]
    ) -> tuple[Any, Any, Any, Objective]:
        """Returns the gradient of the batch's loss, the new collections, the metrics, the loss."""
        return self._gradients(state, batch)

    @functools.cached_property
    def _gradients(self) -> Gradients:
        return Gradients(
            model=self.model,
            task=self.task,
            optimizer=self.optimizer,
            seed=self.seed,
            accumulate=self.accumulate,
            shards=self.shards,
        )


def _average_of(param: jax.Array) -> jax.Array:
    """Returns a copy in a dtype that small changes do not get lost in: float32 for halves."""
    return jnp.array(param, at_least_float32(param))


def _towards(mean: jax.Array, param: jax.Array, share: float) -> jax.Array:
    # By their difference: the average of a frozen parameter stays as it is, to the bit.
    return mean + share * (_average_of(param) - mean)


def is_due(periodic: Periodic, step: jax.Array) -> jax.Array:
    """Returns `periodic.due(step)` for a traced step; always true if int32 cannot represent it.

    If the batch size has changed, it is exact for steps of the current size once each step is one
    batch, and true before that.
    """
    period, progress = periodic.period_steps, periodic.progress
    if period is None:
        return jnp.zeros((), bool)
    ahead = Fraction(0) if progress is None else progress.ahead
    den = math.lcm(period.denominator, ahead.denominator)
    num, plus = int(period * den), int(ahead * den)
    if num * (den + 1) >= 2**31:
        return jnp.ones((), bool)
    # step + ahead crosses a multiple of num / den exactly if (step + ahead) * den mod num is less
    # than den.
    due = ((step % num) * den + plus % num) % num < den
    if progress is None:
        return due
    return due | (step <= math.ceil(progress.marks[-1][0]) + 1)
