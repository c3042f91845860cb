# SPDX-License-Identifier: Apache-2.0
"""Runs a user's task inside a step: padding masked, weights set, metrics made."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp

from trainer.config.errors import UserError
from trainer.step.measured import check_accumulates, metrics_by_name
from trainer.step.metrics import broadcast_weights, mean_collection
from trainer.step.tasks import (
    METRIC_WEIGHTS,
    ONLY_LOSS,
    OWN_NAMES,
    TaskOutput,
    as_output,
    named_twice,
)

# The loader's mark of real rows in a padded batch: bool, (batch,).
MASK = '_mask'

Transform = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class TaskRunner:
    """A task and its metric collection, if it declares one.

    Attributes:
        task: called as `task(model, batch)`.
        metrics: the collection class. It is read from the task once: a property that makes a new
            class at every access would change the type of the state.
        transforms: run over a batch on the devices, before the task sees it.
    """

    task: Callable[..., Any]
    metrics: type[clu.metrics.Collection] | None
    transforms: tuple[Transform, ...] = ()

    @classmethod
    def of(cls, task: Callable[..., Any], transforms: Sequence[Transform] = ()) -> TaskRunner:
        """Returns the runner of a task object or of a plain function.

        Raises:
            UserError: if it cannot be called with a model and a batch.
        """
        try:
            inspect.signature(task).bind(None, None)
        except ValueError:
            pass  # What is written in C has no signature.
        except TypeError as error:
            raise UserError(f'the task {task!r} must take (model, batch): {error}') from error
        metrics = getattr(task, 'metrics', None)
        for name in OWN_NAMES & set(getattr(metrics, '__dataclass_fields__', ())):
            raise UserError(named_twice(f'{task!r}', 'metric', name))
        return cls(task, metrics, tuple(transforms))

    def prepared(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the batch as the task sees it: without the mask, and transformed."""
        seen: Mapping[str, Any] = {name: x for name, x in batch.items() if name != MASK}
        for transform in self.transforms:
            seen = transform(_Batch(seen, f'the device transform {transform}'))
        return _Batch(seen, 'the task')

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> TaskOutput:
        """Returns the task's output with `weights` always set, and 0 where a row is padding.

        Named losses have weights by name, an entry for the metrics among them.
        """
        result = self.task(model, self.prepared(batch))
        output = as_output(result, averaged=self.metrics is None)
        loss, given, mask = output.loss, output.weights, batch.get(MASK)
        if not isinstance(loss, Mapping):
            return dataclasses.replace(output, weights=_set_weights(given, loss, mask))
        # The metrics count the rows of any of the losses: all have the same.
        values = {**loss, METRIC_WEIGHTS: next(iter(loss.values()))}
        by_name = given if isinstance(given, Mapping) else dict.fromkeys(values, given)
        weights = {name: _set_weights(by_name.get(name), x, mask) for name, x in values.items()}
        return dataclasses.replace(output, weights=weights)

    def empty(self, output: TaskOutput) -> clu.metrics.Collection:
        """Returns accumulators that have seen nothing, for outputs like this (abstract) one.

        Raises:
            UserError: naming a metric whose accumulators change their shape.
        """
        empty = self._collection(output).empty()
        check_accumulates(empty, jax.eval_shape(self.measure, output))
        return empty

    def measure(self, output: TaskOutput) -> clu.metrics.Collection:
        """Returns the metrics of one batch."""
        loss, weights = output.loss, output.weights
        outputs: dict[str, Any] = {'loss': loss}
        if isinstance(loss, Mapping) and isinstance(weights, Mapping):
            outputs = {f'{name}_loss': value for name, value in loss.items()}
            outputs.update({f'{name}_weights': weights[name] for name in loss})
            weights = weights[METRIC_WEIGHTS]
        # `weights` for our own metrics, `mask` for those of clu, which know 0 and 1 only.
        outputs = {'mask': jnp.asarray(weights) != 0, 'weights': weights, **outputs}
        return self._collection(output).single_from_model_output(**{**outputs, **output.metrics})

    def _collection(self, output: TaskOutput) -> type[clu.metrics.Collection]:
        if self.metrics is not None:
            return self.metrics
        if isinstance(output.loss, Mapping):
            return mean_collection(tuple(sorted(output.metrics)), tuple(sorted(output.loss)))
        return mean_collection(('loss', *sorted(output.metrics)))


def _set_weights(given: Any, loss: jax.Array, mask: jax.Array | None) -> jax.Array:
    weights = jnp.ones(loss.shape[:1], jnp.float32) if given is None else given
    if mask is not None:
        weights = weights * broadcast_weights(mask, weights.shape)
    return jax.lax.stop_gradient(jnp.asarray(weights, jnp.float32))


def inverse(weight: jax.Array) -> jax.Array:
    """Returns 1 / weight, and 0 for a batch without any weight (all padding), never NaN."""
    return jnp.where(weight != 0, 1.0 / jnp.where(weight != 0, weight, 1.0), 0.0)


def by_name(loss: Any) -> Mapping[str, Any]:
    """Returns the losses by name; a lone one gets a name."""
    return loss if isinstance(loss, Mapping) else {ONLY_LOSS: loss}


def loss_sums(output: TaskOutput) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns sum(weight x value) and sum(weight) of each loss, in float32."""
    weights = output.weights
    totals, sums = {}, {}
    for name, loss in by_name(output.loss).items():
        mine = weights[name] if isinstance(weights, Mapping) else weights
        full = broadcast_weights(jnp.asarray(mine), loss.shape)
        totals[name] = jnp.sum(loss.astype(jnp.float32) * full)
        sums[name] = full.sum()
    return totals, sums


def penalty_sum(output: TaskOutput) -> jax.Array:
    """Returns the float32 sum of the penalties."""
    return sum((jnp.float32(p) for p in output.penalties.values()), jnp.float32(0))


class _Batch(dict[str, Any]):
    """A batch that says what it holds when its reader asks for something else."""

    def __init__(self, fields: Mapping[str, Any], reader: str):
        super().__init__(fields)
        self._reader = reader

    def __missing__(self, name: str) -> Any:
        fields = ', '.join(f'{key}: {x.dtype}{list(x.shape)}' for key, x in self.items())
        raise UserError(
            f'{self._reader} asks for batch[{name!r}], and a batch holds {fields}.\n'
            'Name the field in its arguments, or rename it with a transform '
            '(data.transforms:Rename).'
        )


def is_metric(node: Any) -> bool:
    """Whether a node of a metrics tree is a metric or a collection of them."""
    return isinstance(node, (clu.metrics.Metric, clu.metrics.Collection))


def merge_metrics(old: Any, new: Any) -> Any:
    """Returns the accumulation of two trees of metrics of the same structure."""
    return jax.tree.map(lambda a, b: a.merge(b), old, new, is_leaf=is_metric)


def compute_metrics(metrics: Any) -> Any:
    """Returns the tree of computed values; collections become dicts."""
    return jax.tree.map(_compute, metrics, is_leaf=is_metric)


def _compute(metric: Any) -> Any:
    try:
        return metric.compute()
    except Exception as error:
        for name, each in metrics_by_name(metric):
            try:
                each.compute()
            except Exception:
                error.add_note(f'This happened when the metric {name!r} was computed')
        raise
