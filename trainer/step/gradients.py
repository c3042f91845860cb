# SPDX-License-Identifier: Apache-2.0
"""The gradient of a batch's loss, in one piece or accumulated over slices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.errors import UserError
from trainer.modules.functional import Functional
from trainer.modules.precision import at_least_float32
from trainer.modules.rng import Keys
from trainer.step import views
from trainer.step.health import SIGNS, Signs
from trainer.step.loss_scale import choose
from trainer.step.objective import Objective
from trainer.step.optimizer import Optimizer
from trainer.step.state import TrainState
from trainer.tasks import returned
from trainer.tasks.batch import plain
from trainer.tasks.checks import run_checks
from trainer.tasks.metrics import WeightedMean
from trainer.tasks.runner import (
    TaskRunner,
    by_name,
    inverse,
    loss_sums,
    merge_metrics,
    penalty_sum,
)
from trainer.tasks.task import ONLY_LOSS, TaskOutput
from trainer.tasks.weightless import compute_only_needed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """Differentiates the weighted mean of the loss over a batch, plus its penalties.

    However a batch is cut, the gradient is that of the whole: the slices' sums are divided by the
    weight of them all. Under a loss scale the backward pass is of the scaled loss; what is returned
    is not scaled.

    Attributes:
        model: the model's functional interface.
        task: what the model is asked to do with a batch.
        optimizer: says which loss drives which parameter.
        seed: the run's seed.
        accumulate: slices that a batch is cut into.
        shards: number of devices that a batch's rows are spread over.
    """

    model: Functional
    task: TaskRunner
    optimizer: Optimizer
    seed: int | jax.Array
    accumulate: int = 1
    shards: int = 1

    def check_labels(self, state: TrainState, batch: Mapping[str, jax.Array]) -> Signs:
        """Returns what the task's checks find in a batch, without a gradient."""
        keys = Keys(seed=self.seed, mode='train', step=state.step)

        def check(fields: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            output, _ = self._run_task(state.params, state, fields, keys)
            return run_checks(output.checks, output.weights)

        label, value = compute_only_needed(check, plain(batch))
        return Signs(jnp.zeros((), jnp.float32), label, value)

    def empty_metrics(self, state: TrainState, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns empty accumulators of what comes with the gradients."""
        output = self._output_shapes(state, batch)
        return {
            'task': self.task.empty(output),
            'penalties': {name: WeightedMean.empty() for name in output.penalties},
            SIGNS: Signs.empty(),
        }

    def __call__(
        self, state: TrainState, batch: Mapping[str, jax.Array]
    ) -> tuple[Any, dict[str, Any], dict[str, Any], Objective]:
        """Returns the gradient, the new collections, this batch's metrics and the loss itself.

        With several losses, each parameter gets the gradient of its own loss. Gradients of
        half-precision parameters are float32: after unscaling, small ones would underflow in
        float16. Those of complex parameters are the conjugate of what JAX returns.
        """
        batch = plain(batch)
        scale = jnp.ones((), jnp.float32) if state.loss_scale is None else state.loss_scale.scale
        if self.accumulate == 1:
            whole = self._forward(state, batch, 0)
            factors = {name: scale * inverse(w) for name, w in whole.weights.items()}
            grads = self.optimizer.select(
                {name: whole.pull(name, factor, scale) for name, factor in factors.items()}
            )
            collections, metrics = whole.collections, self._measure(whole)
            value = _mean_loss(whole.values, whole.weights)
        else:
            grads, collections, metrics, value = self._accumulate(state, batch, scale)
        scaled = state.loss_scale is not None
        grads = jax.tree.map(lambda g: _uphill(g, scale if scaled else None), grads)
        return grads, collections, metrics, Objective(value, self._function(state, batch))

    def _function(self, state: TrainState, batch: Mapping[str, jax.Array]) -> Callable[[Any], Any]:
        """Returns the loss of this batch as a function of parameters as an optimizer sees them.

        It draws the same random keys as the gradient did, and starts from the same collections.
        """

        def function(params: Any) -> Any:
            if state.loss_scale is not None:
                raise UserError(
                    f'{self.optimizer.path}: this optimizer computes the loss at other parameters, '
                    'as a line search does, and a dynamic loss scale (config.precision.loss_scale) '
                    'covers the gradient of the step alone: theirs would vanish in float16. Use '
                    'bfloat16, or set config.precision.loss_scale=0'
                )
            return self._loss(views.completed(params, state.params), state, batch)

        return function

    def _loss(self, params: Any, state: TrainState, batch: Mapping[str, jax.Array]) -> Any:
        """Returns the loss that the gradient is of, at other parameters."""
        if self.accumulate == 1:
            sums, (_, _, weights) = self._sums(params, state, batch, 0)
            return _mean_loss(sums, weights)

        def body(collections: Any, item: Any) -> tuple[Any, Any]:
            index, rows = item
            one = dataclasses.replace(state, collections=collections)
            sums, (_, collections, weights) = self._sums(params, one, rows, index)
            return self._left(collections, weights, one), (*sums, weights)

        _, sums = self._scan(body, state.collections, batch)
        return _mean_loss_of_slices(*sums)

    def _scan(self, body: Any, carry: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        """Runs `body(carry, (index, rows))` over the slices of a batch."""
        slices = split_rows(batch, self.accumulate, self.shards)
        # Unrolled where the compiler's loops are slow: XLA's CPU convolutions crawl inside a scan.
        unroll = self.accumulate if jax.default_backend() == 'cpu' else 1
        indices = jnp.arange(self.accumulate)
        return jax.lax.scan(body, carry, (indices, slices), unroll=unroll)

    def _accumulate(
        self, state: TrainState, batch: Mapping[str, jax.Array], scale: jax.Array
    ) -> tuple[Any, dict[str, Any], dict[str, Any], Any]:
        slices = split_rows(batch, self.accumulate, self.shards)
        first = jax.tree.map(lambda x: x[0], slices)
        losses = by_name(self._output_shapes(state, first).loss)
        # The weight of all slices is known only after the last one. Dividing by the number of
        # values first keeps what flows back through the model as small as it is in one piece.
        counts = {name: self.accumulate * max(1, math.prod(x.shape)) for name, x in losses.items()}

        def body(carry: Any, item: Any) -> tuple[Any, Any]:
            grads, penalties, collections, metrics, weights = carry
            index, rows = item
            one = self._forward(dataclasses.replace(state, collections=collections), rows, index)
            new = {name: one.pull(name, scale / count, 0.0) for name, count in counts.items()}
            grads = jax.tree.map(jnp.add, grads, self.optimizer.select(new))
            if one.output.penalties:
                mine = one.pull(None, 0.0, scale / self.accumulate)
                penalties = jax.tree.map(jnp.add, penalties, mine)
            metrics = merge_metrics(metrics, self._measure(one))
            weights = jax.tree.map(jnp.add, weights, one.weights)
            sums = (*one.values, one.weights)
            return (grads, penalties, one.collections, metrics, weights), sums

        # Sums of many small terms: bfloat16 would drop the later ones.
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, at_least_float32(p)), state.params)
        weights = {name: jnp.zeros((), jnp.float32) for name in counts}
        carry = (zeros, zeros, state.collections, self.empty_metrics(state, first), weights)
        carry, sums = self._scan(body, carry, batch)
        grads, penalties, collections, metrics, weights = carry
        rest = {name: count * inverse(weights[name]) for name, count in counts.items()}
        factors = {name: jax.tree.map(lambda _, x=x: x, zeros) for name, x in rest.items()}
        grads = jax.tree.map(
            lambda grad, factor, penalty: grad * factor + penalty,
            grads,
            self.optimizer.select(factors),
            penalties,
        )
        return grads, collections, metrics, _mean_loss_of_slices(*sums)

    def _forward(self, state: TrainState, batch: Mapping[str, jax.Array], index: Any) -> _Forward:
        values, pullback, (output, collections, weights) = jax.vjp(
            lambda params: self._sums(params, state, batch, index), state.params, has_aux=True
        )
        collections = self._left(collections, weights, state)
        return _Forward(pullback, values, output, collections, weights, self._is_weighted)

    def _sums(
        self, params: Any, state: TrainState, batch: Mapping[str, jax.Array], index: Any
    ) -> tuple[Any, Any]:
        """Returns (each loss's weighted sum, the penalties'), (output, collections, weights)."""
        keys = Keys(seed=self.seed, mode='train', step=state.step, index=index)
        output, collections = self._run_task(params, state, batch, keys)
        totals, weights = loss_sums(output)
        return (totals, penalty_sum(output)), (output, collections, weights)

    @property
    def _is_weighted(self) -> bool:
        # Before the task has been traced it is not known.
        return self.task.is_weighted is not False

    def _left(
        self, collections: dict[str, Any], weights: Mapping[str, jax.Array], state: TrainState
    ) -> dict[str, Any]:
        """Returns the collections that a forward pass leaves to the next one."""
        if not self._is_weighted:
            return collections
        # Rows that do not count leave nothing behind, nor does a slice that has no others.
        counts = sum(weights.values(), jnp.float32(0)) != 0
        return choose(counts, collections, state.collections)

    def _measure(self, forward: _Forward) -> dict[str, Any]:
        output = forward.output
        penalties = output.penalties.items()
        label, value = run_checks(output.checks, output.weights)
        return {
            SIGNS: Signs(sum(jax.tree.leaves(forward.values)), label, value),
            'task': self.task.measure(output),
            'penalties': {name: WeightedMean.from_model_output(value) for name, value in penalties},
        }

    def _output_shapes(self, state: TrainState, batch: Mapping[str, Any]) -> TaskOutput:
        keys = Keys(seed=self.seed, mode='train')

        def run(state: TrainState, batch: Mapping[str, Any]) -> TaskOutput:
            return self._run_task(state.params, state, batch, keys)[0]

        return jax.eval_shape(run, dataclasses.replace(state, metrics=None), batch)

    def _run_task(
        self, params: Any, state: TrainState, batch: Mapping[str, Any], keys: Keys
    ) -> tuple[TaskOutput, dict[str, Any]]:
        bound = self.model.bind({'params': params, **state.collections}, keys, ema=state.average)
        output = self.task(bound, batch)
        self.optimizer.check_losses(output.loss)
        returned.check_differentiable(output.loss)
        return output, bound.collections


@dataclasses.dataclass(frozen=True)
class _Forward:
    """A forward pass that can be differentiated.

    Attributes:
        pullback: from cotangents of (each loss's weighted sum, the penalties' sum) to gradients.
        values: each loss's weighted sum, and the penalties' sum.
        output: of the task.
        collections: after the pass.
        weights: the sum of each loss's weights.
        is_weighted: whether the task gives weights.
    """

    pullback: Callable[..., tuple[Any]]
    values: Any
    output: TaskOutput
    collections: dict[str, Any]
    weights: dict[str, jax.Array]
    is_weighted: bool

    def pull(self, name: str | None, loss: Any, penalty: Any) -> Any:
        """Returns the gradient of loss x (the sum of the named loss) + penalty x (penalties).

        One backward pass for each call; the compiler drops what nothing reads.
        """
        factors = {each: jnp.float32(loss if each == name else 0.0) for each in self.weights}
        grads = self.pullback((factors, jnp.float32(penalty)))[0]
        if name is None or not self.is_weighted:
            return grads
        # Where no row counts there is none that could stand in for the others, whatever they hold.
        counts = self.weights[name] != 0
        return jax.tree.map(lambda g: jnp.where(counts, g, jnp.zeros_like(g)), grads)


def _mean_loss(sums: tuple[Any, Any], weights: Mapping[str, jax.Array]) -> Any:
    """Returns the loss that is differentiated, float32; of several losses a dict by name.

    Args:
        sums: each loss's weighted sum, and the penalties' sum.
        weights: each loss's sum of weights.
    """
    totals, penalty = sums
    values = {name: totals[name] * inverse(weights[name]) + penalty for name in totals}
    return values[ONLY_LOSS] if list(values) == [ONLY_LOSS] else values


def _mean_loss_of_slices(totals: Any, penalties: Any, weights: Any) -> Any:
    """Returns the loss of a batch from what its slices gave, (slices,) each."""
    totals, weights = jax.tree.map(lambda x: x.sum(0), (totals, weights))
    return _mean_loss((totals, penalties.mean(0)), weights)


def _uphill(grad: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Converts a gradient of JAX to the one that optimizers expect (conjugate, unscaled)."""
    grad = grad.astype(at_least_float32(grad))
    grad = grad if scale is None else grad / scale
    return grad.conj() if jnp.iscomplexobj(grad) else grad


def split_rows(batch: Any, slices: int, shards: int) -> Any:
    """Cuts every array into (slices, rows / slices, ...), each device keeping its own rows."""

    def split(x: jax.Array) -> jax.Array:
        rows = x.shape[0] // (shards * slices)
        x = x.reshape(shards, slices, rows, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(slices, shards * rows, *x.shape[3:])

    return jax.tree.map(split, batch)
