# SPDX-License-Identifier: Apache-2.0
"""The evaluation of one batch, as pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from trainer.input.host_field import explain_host_fields
from trainer.modules import seen
from trainer.modules.functional import Functional
from trainer.modules.model_view import BoundModel
from trainer.modules.rng import Keys
from trainer.step.health import FINDINGS, Findings, Health
from trainer.tasks.default_prediction import (
    ScoredTask,
    flatten_outputs,
    has_predict,
    predict_by_call,
    select_output,
)
from trainer.tasks.metrics import Count, merge_metrics
from trainer.tasks.runner import MASK, TaskRunner, run_checks
from trainer.tasks.task import TaskOutput

# The key of the averaged parameters, for a task's `model.ema`, among the variables.
EMA = '_ema'


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalStep:
    """The evaluation of one batch, as a pure function that accumulates on the devices.

    Attributes:
        model: the model's functional interface.
        task: computes the metrics of a batch.
        seed: the run's seed, for tasks that use random numbers during evaluation.
        counted: indices of the members of an ensemble to evaluate; empty for all.
        fresh: collections that only the evaluated form of the model has, such as a cache: they are
            created for each batch, and calls may change them.
    """

    model: Functional
    task: TaskRunner
    seed: int | jax.Array
    counted: tuple[int, ...] = ()
    fresh: frozenset[str] = frozenset()

    def without_diverged(self, health: Health) -> EvalStep:
        """Returns the step without members that have diverged; here, itself: no ensemble."""
        return self

    def output_shapes(self, variables: Any, batch: Any) -> TaskOutput:
        """Returns the shapes of the task's output, from arrays or their shapes."""
        # A new function object: a cached trace would not record which fields the task reads.
        return jax.eval_shape(lambda *args: self.run(*args), variables, 0, 0, batch)

    def with_fresh(self, fresh: frozenset[str]) -> EvalStep:
        """Returns the step with these collections created for each batch."""
        return dataclasses.replace(self, fresh=fresh)

    def variables_of_one(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the variables of one model, without the moving average."""
        return {name: value for name, value in variables.items() if name != EMA}

    def init(self, batch: Any) -> Mapping[str, Any]:
        """Returns fresh variables of the evaluated model, for this batch."""
        keys = Keys(seed=self.seed, mode='init')
        # A prediction may contain fields that stay on the host.
        passing = isinstance(self.task.task, ScoredTask)
        fields = self.task.prepare_batch(batch, keys, passing=passing)
        return self.model.init(self.task.task, fields, keys)

    def empty(self, output: TaskOutput) -> dict[str, Any]:
        """Returns empty accumulators for outputs of these shapes."""
        return {
            'task': self.task.empty(output),
            'examples': Count.empty(),
            FINDINGS: Findings.empty(),
        }

    def __call__(
        self,
        totals: dict[str, Any],
        variables: Mapping[str, Any],
        step: jax.Array,
        index: jax.Array,
        batch: Mapping[str, jax.Array],
        output: TaskOutput | None = None,
    ) -> dict[str, Any]:
        """Returns the accumulators with this batch added, without its padding.

        Args:
            totals: the result of `empty` or of an earlier call; donated.
            variables: parameters and collections.
            step: int32 scalar, the state's step.
            index: int32 scalar, the batch's number.
            batch: arrays (examples, ...), including `_mask`.
            output: the result of `run` for this batch, if it is known.
        """
        if output is None:
            output = self.run(variables, step, index, batch)
        # Accumulated like a metric, so that a label out of range costs no synchronization per
        # batch.
        label, value = run_checks(output.checks, output.weights)
        new = {
            FINDINGS: Findings(jnp.zeros((), jnp.float32), label, value),
            'task': self.task.measure(output),
            'examples': Count.from_model_output(batch[MASK]),
        }
        return merge_metrics(totals, new)

    def run(
        self, variables: Mapping[str, Any], step: jax.Array, index: jax.Array, batch: Any
    ) -> TaskOutput:
        """Returns the task's output for a batch."""
        if isinstance(self.task.task, ScoredTask):  # Its predictions are traced apart from this.
            return self.task.task.empty_output(batch[MASK])
        keys = Keys(seed=self.seed, mode='eval', step=step, index=index)
        return self.task(self._bind(variables, keys, batch), batch)

    @property
    def predicts_in_run(self) -> bool:
        """Whether `run_and_predict` may be called."""
        # With weights, the task runs again on a batch whose examples without weight are replaced.
        return not has_predict(self.task.task) and self.task.is_weighted is False

    def run_and_predict(
        self, variables: Mapping[str, Any], step: jax.Array, index: jax.Array, batch: Any
    ) -> tuple[TaskOutput, dict[str, Any]]:
        """Returns the results of `run` and of `predict`, from one run of the task."""
        with seen.record_calls(keep_results=True) as record:
            output = self.run(variables, step, index, batch)
            outputs = select_output(self.task.task, record.calls)
        return output, {**outputs, MASK: batch[MASK]}

    def summarize(
        self, variables: Mapping[str, Any], step: jax.Array, index: jax.Array, batch: Any
    ) -> tuple[Mapping[str, Any], jax.Array]:
        """Returns the task's summaries for a whole batch, padding included, and its mask."""
        keys = Keys(seed=self.seed, mode='eval', step=step, index=index)
        return self.task.summarize(self._bind(variables, keys, batch), batch), batch[MASK]

    def predict(
        self, variables: Mapping[str, Any], step: jax.Array, index: jax.Array, batch: Any
    ) -> dict[str, Any]:
        """Returns the task's predictions for a whole batch, padding included, and its mask.

        Fields that stay on the host are `HostField`s among them. A task without a method `predict`
        predicts the output of the model.
        """
        # The keys of `run`: a task that samples predicts what its metrics were computed from.
        keys = Keys(seed=self.seed, mode='eval', step=step, index=index)
        task: Any = self.task.task
        is_default = not has_predict(task)
        # Those of a model have been computed, so no field of the host is among them.
        fields = self.task.prepare_batch(batch, keys, passing=not is_default)
        model = self._bind(variables, keys, batch)
        with explain_host_fields(fields):
            if is_default:
                outputs = predict_by_call(task, model, fields)
            else:
                outputs = task.predict(model, fields)
        # The caller removes the padding on the host: the number of real examples is not static.
        return {**flatten_outputs(outputs), MASK: batch[MASK]}

    def _bind(self, variables: Mapping[str, Any], keys: Keys, batch: Any) -> BoundModel:
        own = self.variables_of_one(variables)
        if self.fresh:
            # The compiler removes the rest of the initialization.
            new = meta.unbox(self.init(batch))
            own.update({name: new[name] for name in self.fresh})
        model = self.model.bind(own, keys, ema=variables.get(EMA))
        model.allow_changes(self.fresh)
        return model
