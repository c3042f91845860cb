# SPDX-License-Identifier: Apache-2.0
"""The train step: one batch in, one update out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import meta

from trainer.config.durations import Periodic
from trainer.modules.linen import Linen
from trainer.step.context import (
    StepContext,
    StepFunction,
    checked,
    default_step,
    empty_like,
)
from trainer.step.metrics import Last, WeightedMean
from trainer.step.optimizer import Optimizer, Schedule
from trainer.step.rng import Keys
from trainer.step.state import TrainState
from trainer.step.task_runner import TaskRunner, inverse, loss_sums, merge_metrics
from trainer.step.tasks import TaskOutput


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
        shards: number of devices that a batch's rows are spread over.
        log: when rows are logged; where that is known, norms are computed for those steps only.
        last_step: of the run; its row is logged too.
    """

    model: Linen
    task: TaskRunner
    optimizer: Optimizer
    seed: int
    function: StepFunction = default_step
    accumulate: int = 1
    ema_decay: float | None = None
    shards: int = 1
    log: Periodic | None = None
    last_step: int = 0

    def init(self, spec: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Returns the first state, from the shapes of a training batch."""
        return meta.unbox(self.named_init(spec))

    def named_init(self, spec: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Returns the first state, variables still in the boxes that name their dimensions."""
        # Zeros of no consequence: the compiler drops the forward pass, only shapes matter.
        batch = {name: jnp.zeros(s.shape, s.dtype) for name, s in spec.items()}
        variables = dict(
            self.model.init(
                self.task.task, self.task.prepared(batch), Keys(seed=self.seed, mode='init')
            )
        )
        named = variables.pop('params')
        params = meta.unbox(named)
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.transformation(params).init(params),
            collections=variables,
            metrics=None,
            # A copy: two leaves of one donated state must not share a buffer.
            ema=None if self.ema_decay is None else jax.tree.map(jnp.copy, params),
        )
        metrics = self.empty_metrics(meta.unbox(state), batch)
        return dataclasses.replace(state, params=named, metrics=metrics)

    def empty_metrics(self, state: TrainState, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns accumulators that have seen nothing, on the shapes of this state and batch."""
        # The metrics of the state that is being made are not known yet, and not needed.
        state = dataclasses.replace(state, metrics=None)
        if self.function is not default_step:
            return empty_like(jax.eval_shape(self._step, state, batch)[1])
        empty = self._empty_losses(state, batch)
        empty['norms'] = {name: Last.empty() for name in ('grad', 'param', 'update')}
        empty.update(self._learning_rates(lambda schedule: Last.empty()))
        return empty

    def _empty_losses(self, state: TrainState, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns empty accumulators of what comes with the gradients."""
        keys = Keys(seed=self.seed, mode='train')

        def run(state: TrainState, batch: Mapping[str, Any]) -> TaskOutput:
            return self._run_task(state.params, state, batch, keys)[0]

        output = jax.eval_shape(run, dataclasses.replace(state, metrics=None), batch)
        return {
            'task': self.task.empty(output),
            'penalties': {name: WeightedMean.empty() for name in output.penalties},
        }

    def __call__(self, state: TrainState, batch: Mapping[str, jax.Array]) -> TrainState:
        """Returns the state after one step on this batch."""
        new, metrics = self._step(dataclasses.replace(state, metrics=None), batch)
        return dataclasses.replace(new, metrics=merge_metrics(state.metrics, metrics))

    def _step(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Any]:
        result = self.function(state, batch, StepContext(self, state))
        return result if self.function is default_step else checked(state, result)

    def update(self, state: TrainState, grads: Any, collections: Any) -> tuple[TrainState, Any]:
        """Returns the state after the optimizer's update, and its norms and learning rates."""
        tx = self.optimizer.transformation(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = state.apply_updates(updates, opt_state=opt_state, collections=collections)
        if self.ema_decay is not None:
            ema = optax.incremental_update(new.params, state.ema, 1.0 - self.ema_decay)
            new = dataclasses.replace(new, ema=ema)
        metrics = {'norms': self._norms(state.step, grads, new.params, updates)}
        # Of the update just made: the schedule counts the updates before it.
        metrics.update(
            self._learning_rates(lambda schedule: Last.from_model_output(schedule(state.step)))
        )
        return new, metrics

    def _learning_rates(self, measure: Callable[[Schedule], Last]) -> dict[str, Any]:
        schedules = self.optimizer.learning_rates
        if schedules is None:
            return {}
        if not isinstance(schedules, Mapping):
            return {'learning_rate': measure(schedules)}
        return {'learning_rate': {name: measure(each) for name, each in schedules.items()}}

    def _norms(self, step: jax.Array, grads: Any, params: Any, updates: Any) -> dict[str, Last]:
        """Returns the norms of this update; each row holds those of its own step."""
        trees = {
            'grad': self.optimizer.trained(grads),
            'param': jax.tree.leaves(params),
            'update': self.optimizer.trained(updates),
        }

        def measure(trees: Any) -> dict[str, Last]:
            return {name: Last.from_model_output(global_norm(tree)) for name, tree in trees.items()}

        if self.log is None or jax.default_backend() != 'cpu':
            return measure(trees)
        # On a CPU reading every parameter three times costs a tenth of a small model's step; on an
        # accelerator a branch would cost more than the norms.
        return jax.lax.cond(
            is_due(self.log, step + 1) | (step + 1 == self.last_step),
            measure,
            lambda trees: {name: Last.empty() for name in trees},
            trees,
        )

    def gradients(self, state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[Any, Any, Any]:
        """Returns the gradient of the global loss, the new collections and this batch's metrics.

        Of several losses, each parameter gets the gradient of the one that drives it.
        """
        if self.accumulate == 1:
            grads, collections, metrics, _ = self._slice(state, batch, 0, normalise=True)
            return grads, collections, metrics
        slices = split_rows(batch, self.accumulate, self.shards)

        def body(carry: Any, item: Any) -> tuple[Any, None]:
            grads, collections, metrics, weight = carry
            index, rows = item
            new = self._slice(
                dataclasses.replace(state, collections=collections), rows, index, normalise=False
            )
            grads = jax.tree.map(jnp.add, grads, new[0])
            weight = jax.tree.map(jnp.add, weight, new[3])
            return (grads, new[1], merge_metrics(metrics, new[2]), weight), None

        first = jax.tree.map(lambda x: x[0], slices)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads = {'loss': zeros, 'penalties': zeros}
        weight = {name: jnp.zeros((), jnp.float32) for name in self.optimizer.losses}
        carry = (grads, state.collections, self._empty_losses(state, first), weight)
        # Unrolled where the compiler's loops are slow: XLA's CPU convolutions crawl inside a scan.
        unroll = self.accumulate if jax.default_backend() == 'cpu' else 1
        indices = jnp.arange(self.accumulate)
        carry, _ = jax.lax.scan(body, carry, (indices, slices), unroll=unroll)
        grads, collections, metrics, weight = carry
        scales = {
            name: jax.tree.map(lambda _, scale=scale: scale, zeros)
            for name, scale in jax.tree.map(inverse, weight).items()
        }
        grads = jax.tree.map(
            lambda loss, scale, penalty: loss * scale + penalty / self.accumulate,
            grads['loss'],
            self.optimizer.select(scales),
            grads['penalties'],
        )
        return grads, collections, metrics

    def _slice(
        self, state: TrainState, batch: Mapping[str, jax.Array], index: Any, *, normalise: bool
    ) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
        """Differentiates one slice: gradients, collections, metrics and each loss's weight."""
        keys = Keys(seed=self.seed, mode='train', step=state.step, index=index)

        def losses(params: Any) -> Any:
            output, collections = self._run_task(params, state, batch, keys)
            totals, weight = loss_sums(output)
            penalty = sum((jnp.float32(p) for p in output.penalties.values()), jnp.float32(0))
            return (totals, penalty), (output, collections, weight)

        (totals, _), pullback, (output, collections, weight) = jax.vjp(
            losses, state.params, has_aux=True
        )
        zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
        zeros = dict.fromkeys(totals, zero)

        def pull(factors: dict[str, jax.Array], penalty: jax.Array) -> Any:
            """One backward pass for each loss; the compiler drops what `select` leaves over."""
            return self.optimizer.select(
                {name: pullback(({**zeros, name: factors[name]}, penalty))[0] for name in totals}
            )

        if normalise:
            grads = pull({name: inverse(w) for name, w in weight.items()}, one)
        else:
            # The global weight is known only after the last slice; penalties do not wait for it.
            grads = {'loss': pull(dict.fromkeys(totals, one), zero)}
            grads['penalties'] = (
                pullback((zeros, one))[0]
                if output.penalties
                else jax.tree.map(jnp.zeros_like, state.params)
            )
        metrics = {
            'task': self.task.measure(output),
            'penalties': {
                name: WeightedMean.from_model_output(value)
                for name, value in output.penalties.items()
            },
        }
        return grads, collections, metrics, weight

    def _run_task(
        self, params: Any, state: TrainState, batch: Mapping[str, Any], keys: Keys
    ) -> tuple[TaskOutput, dict[str, Any]]:
        bound = self.model.bind({'params': params, **state.collections}, keys, ema=state.ema)
        output = self.task(bound, batch)
        self.optimizer.check_losses(output.loss)
        return output, bound.collections


def is_due(periodic: Periodic, step: jax.Array) -> jax.Array:
    """Returns `periodic.due(step)` for a traced step; true throughout where int32 cannot tell."""
    period = periodic.period_steps
    if period is None:
        return jnp.zeros((), bool)
    num, den = period.numerator, period.denominator
    if num * den >= 2**31:
        return jnp.ones((), bool)
    # step crosses a multiple of num / den exactly if step * den mod num is less than den.
    return (step % num) * den % num < den


def split_rows(batch: Any, slices: int, shards: int) -> Any:
    """Cuts every array into (slices, rows / slices, ...), each device keeping its own rows."""

    def split(x: jax.Array) -> jax.Array:
        rows = x.shape[0] // (shards * slices)
        x = x.reshape(shards, slices, rows, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(slices, shards * rows, *x.shape[3:])

    return jax.tree.map(split, batch)


def global_norm(tree: Any) -> jax.Array:
    """Returns the float32 L2 norm over all leaves."""

    def squares(x: jax.Array) -> jax.Array:
        # A contraction and not a sum of squares: the CPU backend does not vectorise sums.
        x = x.astype(jnp.float32)
        dims = tuple(range(x.ndim))
        return jax.lax.dot_general(
            x, x, ((dims, dims), ((), ())), precision=jax.lax.Precision.HIGHEST
        )

    return jnp.sqrt(sum((squares(x) for x in jax.tree.leaves(tree)), jnp.float32(0)))
