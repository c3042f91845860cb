# SPDX-License-Identifier: Apache-2.0
"""The train step: one batch in, one update out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.config.durations import Periodic
from trainer.modules.linen import Linen
from trainer.step.metrics import Last, WeightedMean, broadcast_weights
from trainer.step.optimizer import Optimizer
from trainer.step.rng import Keys
from trainer.step.state import TrainState
from trainer.step.task_runner import TaskRunner, merge_metrics, without_mask
from trainer.step.tasks import TaskOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A step as a pure function `(state, batch) -> state`, and the state that it starts from.

    Attributes:
        model: the model's functional interface.
        task: what the model is asked to do with a batch.
        optimizer: what turns gradients into updates.
        seed: the run's seed.
        accumulate: slices that a batch is cut into, to save memory; the update is the same.
        ema_decay: decay of the moving average of the parameters, or None for no average.
        shards: number of devices that a batch's rows are spread over.
        log: when rows are logged; where that is known, norms are computed for those steps only.
    """

    model: Linen
    task: TaskRunner
    optimizer: Optimizer
    seed: int
    accumulate: int = 1
    ema_decay: float | None = None
    shards: int = 1
    log: Periodic | None = None

    def init(self, spec: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
        """Returns the first state, from the shapes of a training batch."""
        # Zeros of no consequence: the compiler drops the forward pass, only shapes matter.
        batch = {name: jnp.zeros(s.shape, s.dtype) for name, s in spec.items()}
        variables = dict(
            self.model.init(self.task.task, without_mask(batch), Keys(seed=self.seed, mode='init'))
        )
        params = variables.pop('params')
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.transformation(params).init(params),
            collections=variables,
            metrics=None,
            # A copy: two leaves of one donated state must not share a buffer.
            ema=None if self.ema_decay is None else jax.tree.map(jnp.copy, params),
        )
        return dataclasses.replace(state, metrics=self.empty_metrics(state, batch))

    def empty_metrics(self, state: TrainState, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns accumulators that have seen nothing, on the shapes of this state and batch."""
        keys = Keys(seed=self.seed, mode='train')

        def run(state: TrainState, batch: Mapping[str, Any]) -> TaskOutput:
            return self._run_task(state.params, state, batch, keys)[0]

        # The metrics of the state that is being made are not known yet, and not needed.
        output = jax.eval_shape(run, dataclasses.replace(state, metrics=None), batch)
        empty: dict[str, Any] = {
            'task': self.task.empty(output),
            'penalties': {name: WeightedMean.empty() for name in output.penalties},
            'norms': {name: Last.empty() for name in ('grad', 'param', 'update')},
        }
        if self.optimizer.learning_rate is not None:
            empty['learning_rate'] = Last.empty()
        return empty

    def __call__(self, state: TrainState, batch: Mapping[str, jax.Array]) -> TrainState:
        """Returns the state after one update on this batch."""
        grads, collections, metrics = self._gradients(state, batch)
        tx = self.optimizer.transformation(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if self.ema_decay is not None:
            ema = optax.incremental_update(params, ema, 1.0 - self.ema_decay)
        metrics['norms'] = self._norms(state.step, grads, params, updates)
        if self.optimizer.learning_rate is not None:
            # Of the update just made: the schedule counts the updates before it.
            metrics['learning_rate'] = Last.from_model_output(
                self.optimizer.learning_rate(state.step)
            )
        return dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            collections=collections,
            metrics=merge_metrics(state.metrics, metrics),
            ema=ema,
        )

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
            is_due(self.log, step + 1),
            measure,
            lambda trees: {name: Last.empty() for name in trees},
            trees,
        )

    def _gradients(self, state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[Any, Any, Any]:
        """Returns the gradient of the global loss, the new collections and this batch's metrics."""
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
            return (grads, new[1], merge_metrics(metrics, new[2]), weight + new[3]), None

        first = jax.tree.map(lambda x: x[0], slices)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads = {'loss': zeros, 'penalties': zeros}
        metrics = {
            name: value
            for name, value in self.empty_metrics(state, first).items()
            if name in ('task', 'penalties')
        }
        carry = (grads, state.collections, metrics, jnp.zeros((), jnp.float32))
        # Unrolled where the compiler's loops are slow: XLA's CPU convolutions crawl inside a scan.
        unroll = self.accumulate if jax.default_backend() == 'cpu' else 1
        indices = jnp.arange(self.accumulate)
        carry, _ = jax.lax.scan(body, carry, (indices, slices), unroll=unroll)
        grads, collections, metrics, weight = carry
        scale = _inverse(weight)
        grads = jax.tree.map(
            lambda loss, penalty: loss * scale + penalty / self.accumulate,
            grads['loss'],
            grads['penalties'],
        )
        return grads, collections, metrics

    def _slice(
        self, state: TrainState, batch: Mapping[str, jax.Array], index: Any, *, normalise: bool
    ) -> tuple[Any, Any, Any, jax.Array]:
        """Differentiates one slice: gradients, collections, metrics and the slice's weight."""
        keys = Keys(seed=self.seed, mode='train', step=state.step, index=index)

        def losses(params: Any) -> Any:
            output, collections = self._run_task(params, state, batch, keys)
            weights = broadcast_weights(jnp.asarray(output.weights), output.loss.shape)
            total = jnp.sum(output.loss.astype(jnp.float32) * weights)
            penalty = sum((jnp.float32(p) for p in output.penalties.values()), jnp.float32(0))
            return (total, penalty), (output, collections, weights.sum())

        (total, penalty), pullback, (output, collections, weight) = jax.vjp(
            losses, state.params, has_aux=True
        )
        zero, one = jnp.zeros_like(total), jnp.ones_like(penalty)
        if normalise:
            grads = pullback((_inverse(weight), one))[0]
        else:
            # The global weight is known only after the last slice; penalties do not wait for it.
            grads = {'loss': pullback((one, zero))[0]}
            grads['penalties'] = (
                pullback((zero, one))[0]
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


def _inverse(weight: jax.Array) -> jax.Array:
    # A batch without any weight (all padding) must give a zero gradient, not NaN.
    return jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
