# SPDX-License-Identifier: Apache-2.0
"""Several tasks for the outputs of one model."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp

from trainer.config.errors import UserError
from trainer.modules.ensemble_outputs import mean
from trainer.modules.seen import describe
from trainer.tasks.checks import Check
from trainer.tasks.metrics import broadcast_weights, mean_collection
from trainer.tasks.sums import configure
from trainer.tasks.task import Batch, TaskOutput, as_output


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTask:
    """Several tasks, such as a classification and a regression, for one model.

    The model returns a dict with an output for each part. It is called once, with the inputs of
    the first part; the others must have the same. The loss of an example is the sum of those of its
    parts. A part in which it has no label adds nothing, and its other labels count as always: see
    `ignore_label` of `Classification` and `ignore_nan` of `Regression`.

    The metrics, predictions, penalties and summaries of a part have its name before their own:
    `solubility_loss`. The loss of all is `loss`.

    Attributes:
        parts: tasks by name, Python identifiers. Each returns one loss for each example.
        weights: factor of the loss of a part; 1 for those without an entry.
        keep: batch keys of fields that `predict` returns, too, such as ids or text.
    """

    parts: Mapping[str, Callable[..., Any]] = dataclasses.field(hash=False)
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts or not all(name.isidentifier() for name in self.parts):
            raise ValueError(f'parts: expected tasks by name, identifiers; got {[*self.parts]}')
        if unknown := self.weights.keys() - self.parts.keys():
            raise ValueError(
                f'weights: there is no part {min(unknown)!r}; the parts are {", ".join(self.parts)}'
            )

    @property
    def metrics(self) -> type[clu.metrics.Collection]:
        """`loss`, and the metrics of each part; of a task without `metrics`, its loss."""
        kinds = tuple(
            (f'{part}_{name}', _read_part(kind, part))
            for part, task in self.parts.items()
            for name, kind in _list_metrics(task)
        )
        return mean_collection(('loss',), others=kinds)

    def __call__(self, model: Callable[..., Any], batch: Batch) -> TaskOutput:
        """Returns the weighted sum of the losses of the parts, (batch,).

        Raises:
            UserError: if the model returns no output for a part, or a part does not return one loss
                for each example.
        """
        outputs = _Outputs(model)
        total: Any = 0.0
        metrics: dict[str, Any] = {}
        penalties: dict[str, Any] = {}
        checks: dict[str, Check] = {}
        summaries: dict[str, Any] = {}
        for name, task in self.parts.items():
            averaged = getattr(task, 'metrics', None) is None
            output = as_output(task(outputs.select(name), batch), averaged=averaged)
            loss, weights = _read_loss(name, output)
            factor = self.weights.get(name, 1.0)
            # Selected, because 0 x NaN is NaN.
            total += factor * jnp.where(weights != 0, loss * weights, 0.0)
            found = {**output.metrics, 'loss': loss, 'weights': weights}
            metrics.update({f'{name}/{key}': x for key, x in found.items()})
            penalties.update({f'{name}_{key}': factor * x for key, x in output.penalties.items()})
            checks.update(output.checks)
            summaries.update({f'{name}_{key}': x for key, x in output.summaries.items()})
        return TaskOutput(
            loss=total, metrics=metrics, penalties=penalties, checks=checks, summaries=summaries
        )

    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, Any]:
        """Returns the predictions of the parts that have some, and `keep`."""
        outputs = _Outputs(model)
        predicted = {
            f'{name}_{key}': x
            for name, task in self.parts.items()
            if hasattr(task, 'predict')
            for key, x in task.predict(outputs.select(name), batch).items()
        }
        return {**predicted, **{name: batch[name] for name in self.keep}}

    def combine(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what an ensemble predicts: each part combines its own output.

        Args:
            outputs: those of the members by part, arrays (members, batch, ...).
        """
        parts = {name: getattr(task, 'combine', mean) for name, task in self.parts.items()}
        return {name: combine(outputs[name]) for name, combine in parts.items()}


class _Outputs:
    """The outputs of a model, which is called once."""

    def __init__(self, model: Any):
        self.model = model
        self._inputs: Any = None
        self._output: Any = None

    def select(self, name: str) -> _ModelOfPart:
        """Returns the model as a part sees it: its output is that of the part."""
        return _ModelOfPart(self, name)

    def compute(self, name: str, inputs: Any) -> Any:
        if self._inputs is None:
            self._inputs, self._output = inputs, self.model(*inputs[0], **inputs[1])
        # Compared by identity: the arrays are not known while the step is traced.
        first, these = jax.tree.leaves(self._inputs), jax.tree.leaves(inputs)
        same = len(first) == len(these) and all(map(operator.is_, first, these))
        if not same:
            raise UserError(
                f'config.task.parts.{name}: its inputs are not those of the first part, and the '
                'model is called only once; give all parts the same inputs'
            )
        if not isinstance(self._output, Mapping) or name not in self._output:
            raise UserError(
                f'config.task: the model returned {describe(self._output)}; expected a dict with '
                f'an output for the part {name!r}'
            )
        return self._output[name]


class _ModelOfPart:
    """A model that returns the output of one part."""

    def __init__(self, outputs: _Outputs, name: str):
        self._outputs, self._name = outputs, name

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._outputs.compute(self._name, (args, named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outputs.model, name)


def _read_loss(part: str, output: TaskOutput) -> tuple[jax.Array, jax.Array]:
    """Returns the losses of a part and their weights, each (batch,)."""
    loss, weights = output.loss, output.weights
    if not isinstance(loss, jax.Array) or loss.ndim != 1 or isinstance(weights, Mapping):
        raise UserError(
            f'config.task.parts.{part}: its loss is {describe(loss)}; expected one number for each '
            'example'
        )
    if weights is None:
        return loss, jnp.ones_like(loss, jnp.float32)
    return loss, broadcast_weights(jnp.asarray(weights), loss.shape)


def _list_metrics(task: Any) -> list[tuple[str, Any]]:
    """Returns names and classes of the metrics of a task."""
    collection = getattr(task, 'metrics', None) or mean_collection(('loss',))
    return list(collection.__annotations__.items())


@functools.cache
def _read_part(kind: Any, part: str) -> Any:
    """Returns a subclass of a metric that reads the outputs of a part.

    Cached, because the class is part of the pytree type of a state.
    """

    def from_model_output(cls: Any, *, weights: jax.Array, **outputs: Any) -> Any:
        prefix = f'{part}/'
        own = {n.removeprefix(prefix): x for n, x in outputs.items() if n.startswith(prefix)}
        # Padding does not count in any part.
        own['weights'] = own['weights'] * weights
        return kind.from_model_output.__func__(cls, mask=own['weights'] != 0, **own)

    return configure(kind, kind.__name__, from_model_output=classmethod(from_model_output))
