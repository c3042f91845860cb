# SPDX-License-Identifier: Apache-2.0
"""Predictions without a method `predict`, and tasks that have nothing but this method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp

from trainer.config.errors import UserError
from trainer.modules import seen
from trainer.modules.model_view import path_names
from trainer.modules.shapes import describe
from trainer.tasks.batch import MissingFieldError
from trainer.tasks.returned import name_of
from trainer.tasks.task import TaskOutput

# The name of an output that is an array.
OUTPUT = 'output'

_ADVICE = (
    'Make the task a class with the methods __call__(model, batch) and predict(model, batch); '
    'predict returns a dict of arrays with one entry for each example'
)


def has_predict(task: Any) -> bool:
    """Whether a task has a method `predict`."""
    return callable(getattr(task, 'predict', None))


class ScoredTask:
    """A task of an evaluation with a score, made from one that has nothing but a method `predict`.

    It has neither loss nor metrics.
    """

    metrics = clu.metrics.Collection.create()

    def __init__(self, task: Any):
        self._named_task = task

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_'):  # Such as `_named_task` itself while an object is copied.
            raise AttributeError(name)
        return getattr(self._named_task, name)

    def predict(self, model: Any, batch: Any) -> Any:
        """Returns the predictions of the task."""
        return self._named_task.predict(model, batch)

    def __call__(self, model: Any, batch: Any) -> None:
        """Calls the model as `predict` does, to initialize its variables."""
        self.predict(model, batch)

    def empty_output(self, mask: jax.Array) -> TaskOutput:
        """Returns what an evaluation accumulates for a batch with this mask: no metric."""
        weights = mask.astype(jnp.float32)
        return TaskOutput(loss=jnp.zeros_like(weights), weights=weights)


def predict_by_call(task: Any, model: Any, batch: Any) -> dict[str, Any]:
    """Runs a task and returns the output of the model, by name.

    Args:
        task: calls the model once.
        model: the model as the task calls it.
        batch: the batch of the task, with all fields that it reads.

    Returns:
        An array as 'output'; the entries of a dict under their own names; those of anything else as
        'output/0' and so on.

    Raises:
        UserError: unless the task calls the model exactly once, outside of any transformation of
            JAX.
    """
    with seen.explain_errors(keep_results=True) as record:
        try:
            task(model, batch)
        except MissingFieldError as error:
            raise UserError(
                f'{error}\n{_explain(task)}, and the whole task runs for it. So the data needs '
                f'every field that the task reads. {_ADVICE}'
            ) from error
        return select_output(task, record.calls)


def shape_message(task: Any, name: str, value: Any, num_examples: int) -> str:
    """Returns the error message for an output without one entry for each example."""
    return (
        f'{_explain(task)}. But its {name!r} is {describe(value)}; expected one entry for each of '
        f'the {num_examples} examples of a batch. {_ADVICE}'
    )


def select_output(task: Any, calls: Sequence[seen.Call]) -> dict[str, Any]:
    """Returns the output of the only call of the model: see `predict_by_call`."""
    if not calls:
        raise UserError(f'{_explain(task)}. But the task does not call the model. {_ADVICE}')
    if len(calls) > 1:
        made = '; '.join(f'{call.name}({call.inputs}) returned {call.output}' for call in calls)
        raise UserError(
            f'{_explain(task)}. But the task calls the model {len(calls)} times: {made}. {_ADVICE}'
        )
    (call,) = calls
    if not call.is_direct:
        raise UserError(
            f'{_explain(task)}. But the task calls the model within a transformation of JAX, such '
            f'as jax.grad or jax.vmap. {_ADVICE}'
        )
    return flatten_outputs(call.result)


def flatten_outputs(outputs: Any) -> dict[str, Any]:
    """Returns predictions by path.

    Args:
        outputs: a dict, which may be nested; anything else is the entry 'output' of one.

    Raises:
        UserError: if two of them have the same path, because a name has a '/' in it.
    """
    named: dict[str, Any] = {}
    by_name = outputs if isinstance(outputs, Mapping) else {OUTPUT: outputs}
    for output, value in by_name.items():
        # None has no leaves; as an output it stays, so that it is reported.
        leaves = [((), None)] if value is None else jax.tree_util.tree_leaves_with_path(value)
        for path, x in leaves:
            name = '/'.join((str(output), *path_names(path)))
            if name in named:
                raise UserError(f'two predictions are named {name!r}: rename one of them')
            named[name] = x
    return named


def _explain(task: Any) -> str:
    return (
        f'The task {name_of(task)} has no method `predict`, so its prediction is the output of the '
        'model'
    )
