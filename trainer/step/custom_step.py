# SPDX-License-Identifier: Apache-2.0
"""Custom steps: `config.step` names a function `(state, batch, ctx) -> (state, metrics)`.

It is compiled, sharded, fused, saved and logged like the default step. Written as a custom step,
the default step is::

    def default_step(state, batch, ctx):
        grads, collections, metrics = ctx.gradients(state, batch)
        state, more = ctx.update(state, grads, collections)
        return state, {**metrics, **more}
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.config.errors import UserError
from trainer.modules.model_view import BoundModel
from trainer.modules.rng import Keys
from trainer.modules.shapes import changes, describe
from trainer.step import train_step
from trainer.step.context import Batch, StepContext
from trainer.step.health import UPDATED, Findings, findings_from_metrics, take_findings
from trainer.step.loss_scale import choose
from trainer.step.objective import Objective
from trainer.step.optimizer import Optimizer
from trainer.step.state import TrainState
from trainer.step.step_metrics import measure, step_metrics
from trainer.tasks.batch import device_fields
from trainer.tasks.measured import check_accumulates
from trainer.tasks.metrics import WeightedMean, is_metric
from trainer.tasks.runner import MASK, loss_sums, mean_loss, run_checks
from trainer.tasks.sums import empty_like as fit_sums
from trainer.tasks.task import THROUGHPUT, TaskOutput, duplicate_name_message
from trainer.tasks.weightless import compute_only_needed

CustomStepFunction = Callable[[TrainState, Any, 'CustomStepContext'], tuple[TrainState, Any]]


@dataclasses.dataclass(frozen=True)
class CustomStepContext:
    """The parts of the default step, for a custom step to use or to replace.

    One context is used for one trace of the step.

    Attributes:
        context: the context of the default step.
        state: the state at the beginning of this step.
        mask: the mask of a nested batch that has no place for it, such as a tuple; or None.
    """

    context: StepContext
    state: TrainState
    mask: jax.Array | None = None
    # Names of the parts that the function has used: see `check_used` and `runs_task`.
    _called: set[str] = dataclasses.field(default_factory=set)
    # The gradients that `gradients` has returned, each with its loss.
    _objectives: list[tuple[Any, Objective]] = dataclasses.field(default_factory=list)

    @property
    def task(self) -> Callable[[Any, Any], TaskOutput]:
        """The task, as `task(model, batch) -> TaskOutput` with weights, 0 for padding."""
        self._called.add('task')
        task = self.context.task
        if task.structure is None:
            return task
        return lambda model, batch: task(model, task.flatten_batch(batch, self.mask))

    @property
    def runs_task(self) -> bool:
        """Whether the function has read `task` so far."""
        return 'task' in self._called

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the config."""
        return self.context.optimizer

    @property
    def tx(self) -> optax.GradientTransformation:
        """The complete transformation: clipping, groups, multipliers and frozen parameters.

        It takes gradients as `gradients` returns them; add its updates with `optax.apply_updates`.
        """
        return self.optimizer.transformation(self.state.params)

    @property
    def seed(self) -> int | jax.Array:
        """The run's seed; for a member of an ensemble, the seed of that member."""
        return self.context.seed

    def keys(self, index: int | jax.Array = 0) -> Keys:
        """Returns the random keys of this step; each index has its own keys."""
        return Keys(seed=self.seed, mode='train', step=self.state.step, index=index)

    def rng(self, name: str, index: int | jax.Array = 0) -> jax.Array:
        """Returns the random key of the RNG stream `name` in this step."""
        return self.keys(index).stream(name)

    def bind(
        self,
        params: Any = None,
        collections: Mapping[str, Any] | None = None,
        *,
        index: int | jax.Array = 0,
    ) -> BoundModel:
        """Returns the model as a task calls it, in training mode.

        Args:
            params: the parameters; by default those at the beginning of this step.
            collections: the other variables; by default those at the beginning of this step. After
                the calls, the model's `collections` has the updated ones.
            index: selects the random keys. Models with the same index draw the same dropout mask.
        """
        params = self.state.params if params is None else params
        collections = self.state.collections if collections is None else collections
        variables = {'params': params, **collections}
        return self.context.model.bind(variables, self.keys(index), ema=self.state.average)

    def loss(self, output: TaskOutput) -> Any:
        """Returns the scalar that the default step minimizes; for named losses, a dict of them."""
        totals, weights, penalty = loss_sums(output)
        return mean_loss((totals, penalty), weights)

    def gradients(self, state: TrainState, batch: Batch) -> tuple[Any, dict[str, Any], Any]:
        """Computes the gradients of the default step, over micro-batches if the config says so.

        Returns:
            Gradients like `state.params` (float32 for half-precision parameters; for complex ones
            the conjugate of what `jax.grad` returns), the collections after the forward pass, and
            the task's metrics.
        """
        self._called.add('gradients')
        grads, collections, metrics, objective = train_step.gradients(
            state, self.context.task.flatten_batch(batch, self.mask), self.context
        )
        # So that `update` can pass the loss of these gradients to the optimizer.
        self._objectives.append((grads, objective))
        return grads, collections, metrics

    def update(
        self,
        state: TrainState,
        grads: Any,
        collections: Mapping[str, Any] | None = None,
        *,
        findings: Findings | None = None,
        **extra: Any,
    ) -> tuple[TrainState, dict[str, Any]]:
        """Updates the parameters and the moving average; returns the new state and metrics.

        Args:
            state: the state before the update.
            grads: pytree like the parameters, as `gradients` returns it.
            collections: all other variables, if they change.
            findings: the findings of the forward pass; with them, the check after the step needs no
                second pass over the state.
            **extra: further arguments of the optimizer, such as `value=loss`. Gradients that
                `gradients` returned come with their loss (`value`), the gradient (`grad`) and the
                loss as a function of the parameters (`value_fn`).
        """
        collections = state.collections if collections is None else collections
        return train_step.apply_update(
            state,
            grads,
            collections,
            self.context,
            findings=findings,
            loss=self._objective(grads),
            extra=extra,
        )

    def metrics(
        self, output: TaskOutput, new: TrainState | None = None, grads: Any = None
    ) -> dict[str, Any]:
        """Returns the metrics of a default row, for a step that computes its own gradients.

        They include the findings of the forward pass, so that a loss that is not finite and a label
        out of range stop the run as in a default step.

        Args:
            output: what `task` has returned. Return it from the differentiated function as an
                auxiliary value.
            new: the state after the update, of a step that does not call `update`. With it, the
                metrics include norms and learning rates, which `update` would return.
            grads: the gradients, like `state.params`; needed with `new`.

        Raises:
            UserError: if only one of `new` and `grads` is given.
        """
        if (new is None) != (grads is None):
            raise UserError(
                'ctx.metrics: norms need both the state after the update and the gradients: '
                'ctx.metrics(output, new, grads). After ctx.update, which returns norms itself, '
                'call ctx.metrics(output)'
            )
        totals, _, penalty = loss_sums(output)
        measured = measure(output, (totals, penalty), self.context.task)
        if new is None:
            return measured
        updates = jax.tree.map(jnp.subtract, new.params, self.state.params)
        return {**measured, **step_metrics(self.state, new, grads, updates, self.context)}

    def check_used(self) -> None:
        """Checks that no config key is ignored because the function does not use its part.

        Raises:
            UserError: if `config.accumulate` is set and the function has not called `gradients`.
        """
        accumulate = self.context.accumulate
        if accumulate > 1 and 'gradients' not in self._called:
            raise UserError(
                f'config.accumulate={accumulate}: only ctx.gradients splits a batch into '
                'micro-batches, and the function of config.step does not call it. Call it, or '
                'remove config.accumulate (a function that splits batches itself should take '
                'their number as an argument of its own)'
            )

    def _objective(self, grads: Any) -> Objective | None:
        """Returns the loss of these gradients; None if `gradients` did not return them."""
        # By the identity of the arrays: a scaled or clipped gradient is no longer that of the loss.
        leaves = jax.tree.leaves(grads)
        for returned, objective in self._objectives:
            if [*map(id, leaves)] == [*map(id, jax.tree.leaves(returned))]:
                return objective
        return None


def run(
    state: TrainState, batch: Batch, ctx: StepContext, *, function: CustomStepFunction
) -> tuple[TrainState, dict[str, Any]]:
    """Runs the function of `config.step`, checks its result, and updates the health."""
    view = ctx.task.wrap_batch(batch, 'the function of config.step')
    mask = None if isinstance(view, Mapping) else batch.get(MASK)
    context = CustomStepContext(ctx, state, mask)
    result = function(state, view, context)
    context.check_used()
    new, metrics, findings = check_result(state, result)
    if ctx.tracks_health:
        if findings is None:
            findings = _findings(state, batch, metrics, ctx, labels=context.runs_task)
        # `ctx.update` sees the findings of the forward pass only if they are passed to it.
        new = _apply_health(new, state, findings, ctx)
    return new, metrics


def _findings(
    state: TrainState, batch: Batch, metrics: Any, ctx: StepContext, *, labels: bool
) -> Findings:
    """Returns the findings for a function that has not called `ctx.gradients`.

    Args:
        state: the state before the step.
        batch: arrays (batch, ...) by field name.
        metrics: the metrics of the function; its losses are found among them by name.
        ctx: the context of the default step.
        labels: whether to check the labels by running the task. The model itself does not run,
            because the allowed range of labels depends only on shapes.
    """
    findings = findings_from_metrics(metrics)
    if not labels:
        return findings

    def check(fields: Batch) -> tuple[jax.Array, jax.Array]:
        _, (output, *_) = train_step.weighted_sums(state.params, state, fields, ctx)
        return run_checks(output.checks, output.weights)

    label, value = compute_only_needed(check, device_fields(batch))
    return dataclasses.replace(findings, label=label, value=value)


def _apply_health(
    new: TrainState, old: TrainState, findings: Findings, ctx: StepContext
) -> TrainState:
    """Returns the state after a custom step; the old values if its forward pass was bad.

    Args:
        new: the state after the step.
        old: the state before the step.
        findings: the findings of its forward pass.
        ctx: the context of the default step.
    """
    checked = train_step.skip_if_not_finite(new, old, findings, None, ctx)
    # The forward pass comes first, so its findings take precedence over those of the updates.
    early = checked.health
    assert early is not None and new.health is not None
    health = choose(early.is_bad, early, new.health)
    # Each update of the function increments `step`, but the function as a whole is one step. So a
    # finding of its second update would have the number of the next step.
    step = jnp.where(health.is_bad & ~early.is_bad, old.step + 1, health.bad_step)
    health = health.with_bad_step(step)
    if not ctx.stops:
        return dataclasses.replace(checked, health=health)
    fields = UPDATED if ctx.sweeps else tuple(name for name in UPDATED if name != 'opt_state')
    return dataclasses.replace(new.revert_if(health.is_bad, old, fields), health=health)


def check_result(
    before: TrainState, result: Any
) -> tuple[TrainState, dict[str, Any], Findings | None]:
    """Checks the result of a custom step, and returns its state, metrics and findings.

    The findings are those of its calls of `ctx.gradients`, if it returned their metrics.

    `step` increases by one however many updates the function makes: it counts batches.

    Raises:
        UserError: if the result is not `(state, metrics)`, or the state's shapes have changed.
    """
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], TrainState):
        raise UserError(
            'config.step: the function must return (state, metrics), with a state made from the '
            f'given one as in state.replace(params=...); got {_kind(result)}'
        )
    after = dataclasses.replace(result[0], step=before.step + 1, metrics=before.metrics)
    # Programs are compiled for one structure of the state.
    changed = changes(before, after)
    if changed:
        raise UserError(f'config.step: the function changed the shapes of the state: {changed}')
    metrics, findings = take_findings(result[1])
    merged = functools.reduce(lambda a, b: a.merge(b), findings) if findings else None
    return after, _as_metrics(metrics), merged


def empty_like(metrics: Any) -> Any:
    """Returns empty accumulators for metrics like these.

    Args:
        metrics: the metrics of a custom step, or their shapes.

    Raises:
        UserError: naming a metric whose accumulators change shape.
    """
    empty = jax.tree.map(lambda metric: type(metric).empty(), metrics, is_leaf=is_metric)
    empty = fit_sums(empty, metrics)
    check_accumulates(empty, metrics)
    return empty


def _as_metrics(metrics: Any) -> dict[str, Any]:
    if isinstance(metrics, clu.metrics.Collection):
        return {'task': metrics}
    if not isinstance(metrics, Mapping):
        raise UserError(
            'config.step: the function must return (state, metrics), with metrics in a dict by '
            f'name; got {_kind(metrics)}'
        )
    for name, value in metrics.items():
        # In a row, these names stand for several metrics: they must be dicts or collections.
        is_single = name in ('task', 'penalties', 'norms') and not isinstance(value, Mapping)
        if name in THROUGHPUT or (is_single and not isinstance(value, clu.metrics.Collection)):
            raise UserError(f'config.step: the function {duplicate_name_message("metric", name)}')
    return {name: _as_metric(name, value) for name, value in metrics.items()}


def _as_metric(name: str, value: Any) -> Any:
    if is_metric(value):
        return value
    if isinstance(value, Mapping):
        return {key: _as_metric(f'{name}/{key}', each) for key, each in value.items()}
    if isinstance(value, (jax.Array, np.ndarray, np.generic, float, int)) and not jnp.ndim(value):
        return WeightedMean.from_model_output(jnp.asarray(value))
    raise UserError(
        f'config.step: the metric {name!r} must be a scalar (the mean over the steps is logged) or '
        f'a clu metric; got {_kind(value)}'
    )


def _kind(value: Any) -> str:
    """Returns a description of a value by type, for messages."""
    if isinstance(value, tuple):
        return f'({", ".join(map(_kind, value))})'
    return describe(value) if hasattr(value, 'shape') else type(value).__name__
