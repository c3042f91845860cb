# SPDX-License-Identifier: Apache-2.0
"""Runs a user's task inside a step: masks padding, sets weights, computes metrics."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.errors import UserError
from trainer.input.fields import MASK as MASK
from trainer.input.host_field import HostField, HostFieldSpec, explain_host_fields
from trainer.input.structure import Structure
from trainer.modules import seen
from trainer.modules.model_view import BoundModel
from trainer.modules.rng import Keys
from trainer.tasks import returned
from trainer.tasks.batch import (
    PlainBatch,
    UnsentField,
    device_fields,
    flatten_batch,
    note_weights,
    reads,
    view_batch,
)
from trainer.tasks.checks import Check
from trainer.tasks.collecting import (
    collected_arrays,
    explain_missing_output,
    split_collecting,
)
from trainer.tasks.measured import check_accumulates, find_failing_metric, metrics_by_name
from trainer.tasks.metrics import broadcast_weights, is_metric, mean_collection
from trainer.tasks.summaries import check_summaries
from trainer.tasks.sums import empty_like
from trainer.tasks.task import (
    METRIC_WEIGHTS,
    ONLY_LOSS,
    OWN_NAMES,
    TaskOutput,
    as_output,
    duplicate_name_message,
)
from trainer.tasks.transformed import KeyedTransform, Transform, apply_transforms, field_origins
from trainer.tasks.weightless import (
    Weighing,
    compute_only_needed,
    counted_examples,
    replace_uncounted_examples,
)

# Tolerance of range checks: labels that are probabilities may exceed 0 or 1 by rounding errors.
_ROUNDING = 1e-3


@dataclasses.dataclass(frozen=True)
class TaskRunner:
    """A task and its metric collection, if it declares one.

    Attributes:
        task: called as `task(model, batch)`.
        metrics: the collection class. It is read from the task once: a property that creates a
            class at every access would change the pytree type of the state.
        transforms: device transforms, applied to a batch before the task.
        kept: the fields that stay on the host.
        is_weighted: whether the task returns weights; None until its shapes have been traced. The
            output of the task is checked in that first trace.
        collecting: names and classes of the metrics that need all examples at once, on the host:
            `clu.metrics.CollectingMetric`. They are not in `metrics`.
        structure: tree structure of nested batches, which the task sees as the loader returns them;
            None for a dict of arrays. All other code sees the arrays by name.
        path: the config path of the task, for messages.
    """

    task: Callable[..., Any]
    metrics: type[clu.metrics.Collection] | None
    transforms: tuple[Transform, ...] = ()
    kept: tuple[HostFieldSpec, ...] = ()
    is_weighted: bool | None = None
    collecting: tuple[tuple[str, type[clu.metrics.CollectingMetric]], ...] = ()
    structure: Structure | None = None
    path: str = 'config.task'

    @classmethod
    def from_task(
        cls,
        task: Callable[..., Any],
        transforms: Sequence[Transform] = (),
        path: str = 'config.task',
    ) -> TaskRunner:
        """Returns the runner of a task object or of a plain function.

        Args:
            task: called as `task(model, batch)`.
            transforms: device transforms.
            path: the config path of the task, for messages.

        Raises:
            UserError: if it cannot be called with a model and a batch.
        """
        try:
            inspect.signature(task).bind(None, None)
        except ValueError:
            pass  # A callable implemented in C may have no signature.
        except TypeError as error:
            raise UserError(
                f'the task {returned.name_of(task)} must take (model, batch): {error}'
            ) from error
        metrics = getattr(task, 'metrics', None)
        for name in OWN_NAMES & set(getattr(metrics, '__dataclass_fields__', ())):
            raise UserError(
                f'the task {returned.name_of(task)} {duplicate_name_message("metric", name)}'
            )
        on_devices, collecting = split_collecting(metrics)
        return cls(task, on_devices, tuple(transforms), collecting=collecting, path=path)

    def with_host_fields(
        self, kept: Sequence[HostFieldSpec], is_weighted: bool | None = None
    ) -> TaskRunner:
        """Returns the runner for batches with fields that stay on the host."""
        return dataclasses.replace(self, kept=tuple(kept), is_weighted=is_weighted)

    def with_structure(self, structure: Structure | None) -> TaskRunner:
        """Returns the runner for batches of a structure."""
        return dataclasses.replace(self, structure=structure)

    def wrap_batch(self, batch: Mapping[str, Any], reader: str) -> Any:
        """Returns the batch of the loader, with the mask, for code other than a task.

        A nested batch whose top is no dict has no place for the mask.

        Args:
            batch: arrays (batch, ...) by field name.
            reader: description of that code, for messages.
        """
        fields = device_fields(batch)
        rest, unsent = self._hidden_fields(fields)
        rest.update({name: UnsentField(name) for name in unsent})
        origins = {name: frozenset({name}) for name in fields}
        view = view_batch(self.structure, {**fields, **rest}, reader, origins=origins)
        if self.structure is not None and self.structure.has_place_for_mask and MASK in fields:
            view[MASK] = fields[MASK]
        return view

    def flatten_batch(self, batch: Any, mask: Any) -> dict[str, Any]:
        """Returns the device fields of a batch, as code other than a task has it, by name.

        Args:
            batch: of the structure of the loader's batches.
            mask: of the loader's batch, if it has no place in `batch`; None for none.

        Raises:
            UserError: if fields are missing or new in a nested batch.
        """
        if self.structure is None:
            return device_fields(batch)
        fields = flatten_batch(batch)
        known = {*self.structure.names}
        missing = known - fields.keys() - {kept.name for kept in self.kept}
        new = fields.keys() - known - {MASK}
        if missing or new:
            raise UserError(
                f'config.step: the batch for the task {"lacks" if missing else "has"} '
                f'{", ".join(sorted(missing or new))}, unlike the batches of the loader. A step '
                'may replace values of a nested batch, but not add or remove fields'
            )
        if mask is not None and MASK not in fields:
            fields[MASK] = mask
        return fields

    def prepare_batch(
        self, batch: Mapping[str, Any], keys: Keys | None, *, passing: bool = False
    ) -> Any:
        """Returns the batch as the task sees it: without the mask, and transformed.

        Args:
            batch: arrays (batch, ...) by field name.
            keys: the random keys of this step or evaluation batch, for the transforms.
            passing: whether the task may return fields that stay on the host; it cannot compute
                with them.
        """
        if self.kept or passing or reads.get() is not None:
            return self._record_batch(batch, keys, passing=passing)
        # The common case: all fields are on the devices, and reads need not be recorded.
        fields: Any = PlainBatch({name: x for name, x in batch.items() if name != MASK})
        if self.structure is not None:
            fields = self.structure.rebuild(fields, PlainBatch)
        for transform in self.transforms:
            bound = transform.bind(keys) if isinstance(transform, KeyedTransform) else transform
            result: Any = bound(fields)
            fields = PlainBatch(result) if isinstance(result, Mapping) else result
        return fields

    def _record_batch(self, batch: Mapping[str, Any], keys: Keys | None, *, passing: bool) -> Any:
        """Returns the batch as the task sees it, which records each read."""
        fields = {name: x for name, x in device_fields(batch).items() if name != MASK}
        hidden, unsent = self._hidden_fields(fields)
        if not self.transforms:
            visible = {**fields, **hidden, **{name: UnsentField(name) for name in unsent}}
            origins = {name: frozenset({name}) for name in fields}
            seen.restart()
            return view_batch(self.structure, visible, 'the task', origins=origins, passing=passing)
        size = next((x.shape[0] for x in device_fields(batch).values()), None)
        # A transform may loop over all fields, so those that were not sent are zeros here. Fields
        # computed from the zeros are replaced below, so that the task cannot use them by mistake.
        zeros = {
            name: jnp.zeros(
                (kept.shape[0] if size is None else size, *kept.shape[1:]), kept.device_dtype
            )
            for name, kept in unsent.items()
        }
        given = ({**fields, **zeros}, hidden, keys, self.structure)
        transformed, structure = apply_transforms(self.transforms, *given)
        # Finding the origins traces the transforms again, so only when something depends on them.
        origins = {}
        if zeros or reads.get() is not None:
            origins = field_origins(self.transforms, *given)
        missing = {
            name: UnsentField(name)
            for name in transformed
            if origins.get(name, set()) & zeros.keys()
        }
        # Error messages list the fields that the task has read; those that transforms have read
        # would be misleading there.
        seen.restart()
        visible = {**transformed, **missing}
        return view_batch(structure, visible, 'the task', origins=origins, passing=passing)

    def _hidden_fields(
        self, fields: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, HostFieldSpec]]:
        """Returns the fields that no device can store, and those that were not sent to any."""
        kept = [each for each in self.kept if each.name not in fields]
        hidden = {each.name: HostField(each) for each in kept if each.device_dtype is None}
        return hidden, {each.name: each for each in kept if each.device_dtype is not None}

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> TaskOutput:
        """Returns the task's output with `weights` always set, and 0 for padding.

        Weights of named losses are a dict by name, with one more entry for the metrics.

        An example whose weights are all 0 must not affect anything, whatever its values, but 0
        times a non-finite gradient is not 0. So a task that returns weights runs a second time, on
        a batch in which each such example is replaced by one with nonzero weight. Only the weights
        of the first run are used, and the compiler removes the rest of it.
        """
        # The common case needs one run: without weights of the task, only padding has weight 0, and
        # padding repeats real examples.
        if self.is_weighted is False:
            fields = self.prepare_batch(batch, getattr(model, 'own_keys', None))
            return self._with_weights(self.task(model, fields), batch)[0]
        # The second run must draw the same random numbers and start from the same collections, so
        # the calls of the first one are undone.
        undo = model.remember() if isinstance(model, BoundModel) else lambda: None
        sent = device_fields(batch)
        weighing = None
        if self.is_weighted:
            weighing = compute_only_needed(lambda x: self._run(_callable_here(model), x)[1], sent)
            undo()
        if weighing is None:
            # The first trace, or a task whose weights do not decide which examples count.
            output, weighing = self._run(model, sent)
            if weighing is None:
                return output
            undo()
        note_weights()
        output, _ = self._run(
            model, replace_uncounted_examples(sent, counted_examples(weighing.counted))
        )
        metrics = output.metrics if weighing.metrics is None else weighing.metrics
        return dataclasses.replace(output, weights=weighing.weights, metrics=metrics)

    def _run(self, model: Any, batch: Mapping[str, Any]) -> tuple[TaskOutput, Weighing | None]:
        """Runs the task; returns its output with weights set, and its own weights, if any."""
        fields = self.prepare_batch(batch, getattr(model, 'own_keys', None))
        with explain_host_fields(fields):
            result = self.task(model, fields)
        return self._with_weights(result, batch)

    def _with_weights(
        self, result: Any, batch: Mapping[str, Any]
    ) -> tuple[TaskOutput, Weighing | None]:
        """Returns the output with weights set, and the task's own weights, if any."""
        # A TaskOutput is checked once, in the first trace of the shapes; a step is traced several
        # times. Other results have to be converted, which checks them again.
        is_checked = self.is_weighted is not None and isinstance(result, TaskOutput)
        output = result if is_checked else self._as_output(result, batch)
        own, mask = output.weights, batch.get(MASK)
        losses: dict[str, Any] = {ONLY_LOSS: output.loss}
        if isinstance(output.loss, Mapping):
            # Weights of the metrics get the shape of any of the losses: all have one entry for each
            # example.
            losses = {**output.loss, METRIC_WEIGHTS: next(iter(output.loss.values()))}
        is_single = list(losses) == [ONLY_LOSS]
        named = own if isinstance(own, Mapping) else dict.fromkeys(losses, own)
        weights = {}
        for name, loss in losses.items():
            weight = named.get(name)
            each = jnp.ones(loss.shape[:1], jnp.float32) if weight is None else jnp.asarray(weight)
            if not each.ndim:
                each = jnp.broadcast_to(each, loss.shape[:1])
            # A product: padding has weight 0, whatever the task returns for it.
            if mask is not None:
                each = each * broadcast_weights(mask, each.shape)
            # Weights may depend on the parameters, but they are not part of what is minimized:
            # otherwise training could lower the loss by shrinking them.
            weights[name] = jax.lax.stop_gradient(jnp.asarray(each, jnp.float32))
        output = dataclasses.replace(output, weights=weights[ONLY_LOSS] if is_single else weights)
        # In a loss without weights every example counts, so no example can be replaced.
        if own is None or not set(losses_by_name(output.loss)) <= set(named):
            return output, None
        # Dimension 0 of a loss may be something else than examples, such as tokens. Then it is
        # unknown which examples have weight 0.
        counted = [weights[name] for name in named]
        sizes = {x.shape[0] for x in device_fields(batch).values()}
        if any({*jnp.shape(x)[:1]} != sizes for x in counted):
            return output, None
        # Metrics without weights of their own count every example, too: they are those of the first
        # run, whose examples have not been replaced.
        metrics = None if is_single or METRIC_WEIGHTS in named else dict(output.metrics)
        return output, Weighing(output.weights, tuple(counted), metrics)

    def _as_output(self, result: Any, batch: Mapping[str, Any]) -> TaskOutput:
        mask = batch.get(MASK)
        try:
            output = as_output(result, averaged=self.metrics is None)
            if output.summaries:
                first = jax.tree.leaves(device_fields(batch) if mask is None else mask)[0]
                check_summaries(output.summaries, first.shape[0])
            for loss in losses_by_name(output.loss).values():
                if mask is not None:
                    returned.check_num_examples(loss, mask)
                returned.warn_about_pairs(loss, device_fields(batch), self.task)
            return output
        except UserError as error:
            raise UserError(f'the task {returned.name_of(self.task)} {error}') from error

    def summarize(self, model: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the summaries of the task, with entries for padding, too."""
        # The first run alone: in a second one, examples without weight would be replaced.
        return self._run(model, batch)[0].summaries

    def empty(self, output: TaskOutput) -> clu.metrics.Collection:
        """Returns empty accumulators for outputs of these shapes.

        Args:
            output: shapes of what the task returns.

        Raises:
            UserError: naming a metric whose accumulators change shape.
        """
        new = jax.eval_shape(self.measure, output)
        empty = empty_like((self.metrics or self._means(output)).empty(), new)
        check_accumulates(empty, new)
        return empty

    def measure(
        self, output: TaskOutput, collection: type[clu.metrics.Collection] | None = None
    ) -> clu.metrics.Collection:
        """Returns the metrics of one batch.

        Args:
            output: what the task returned.
            collection: other metrics than those of the task that accumulate on the devices.

        Raises:
            UserError: that of a metric, which it names.
        """
        loss, weights = output.loss, output.weights
        outputs: dict[str, Any] = {'loss': loss}
        if isinstance(loss, Mapping) and isinstance(weights, Mapping):
            outputs = {f'{name}_loss': value for name, value in loss.items()}
            outputs.update({f'{name}_weights': weights[name] for name in loss})
            weights = weights[METRIC_WEIGHTS]
        # `weights` for the metrics of this package; `mask` for those of clu, which take 0 or 1.
        outputs = {'mask': jnp.asarray(weights) != 0, 'weights': weights, **outputs}
        collection = collection or self.metrics or self._means(output)
        # Not `gather_from_model_output`, clu's usual choice: it gathers over an axis of `pmap`, but
        # a step is one program over the global batch.
        outputs.update(output.metrics)
        try:
            return collection.single_from_model_output(**outputs)
        except Exception as error:
            name = find_failing_metric(collection, outputs)
            if name is None:
                raise
            where = f'the metric {name!r} of the task {returned.name_of(self.task)}'
            if name in getattr(self.task, 'extra_metrics', ()):
                where = f'{self.path}.extra_metrics.{name}'
            if isinstance(error, UserError):
                raise UserError(f'{where}: {error}') from error
            error.add_note(f'This happened in {where}')
            raise

    def collect(self, output: TaskOutput) -> dict[str, dict[str, jax.Array]]:
        """Returns the arrays that collecting metrics collect from one batch, by name.

        Raises:
            UserError: if dimension 0 of an array is not the batch.
        """
        if not self.collecting:
            return {}
        size = next(iter(losses_by_name(output.loss).values())).shape[0]
        collected = {}
        for name, kind in self.collecting:
            with explain_missing_output(name, output.metrics):
                metric = self.measure(output, clu.metrics.Collection.create(**{name: kind}))
            collected[name] = collected_arrays(name, getattr(metric, name), size)
        return collected

    def _means(self, output: TaskOutput) -> type[clu.metrics.Collection]:
        """Returns the collection for a task that declares none: the means of its outputs."""
        if isinstance(output.loss, Mapping):
            return mean_collection(tuple(sorted(output.metrics)), tuple(sorted(output.loss)))
        return mean_collection(('loss', *sorted(output.metrics)))


def _callable_here(model: Any) -> Any:
    """Returns the model for a transformation of JAX, whose changes of collections are lost."""
    changes = isinstance(model, BoundModel) and model.changes_collections
    return model.with_collections() if changes else model


def safe_inverse(weight: jax.Array) -> jax.Array:
    """Returns 1 / weight, or 0 for a batch of weight 0 (all padding); never NaN."""
    # The inner `where` keeps the unused branch finite, for programs that check for infinities.
    return jnp.where(weight != 0, 1.0 / jnp.where(weight != 0, weight, 1.0), 0.0)


def losses_by_name(loss: Any) -> Mapping[str, Any]:
    """Returns the losses by name; an unnamed loss is `ONLY_LOSS`."""
    return loss if isinstance(loss, Mapping) else {ONLY_LOSS: loss}


def loss_sums(output: TaskOutput) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """Returns sum(weight x value) and sum(weight) of each loss, and the sum of the penalties.

    All are float32 scalars. The quotient of the two sums plus the penalties is the loss of a batch.
    """
    totals, weights = {}, {}
    losses: Any = output.loss if isinstance(output.loss, Mapping) else {ONLY_LOSS: output.loss}
    for name, loss in losses.items():
        weight = output.weights[name] if isinstance(output.weights, Mapping) else output.weights
        full = broadcast_weights(jnp.asarray(weight), loss.shape)
        # `where` and not the product alone: a value of weight 0 may be NaN, and 0 x NaN is NaN.
        totals[name] = jnp.sum(jnp.where(full != 0, loss.astype(jnp.float32) * full, 0.0))
        weights[name] = full.sum()
    penalties = sum((jnp.float32(p) for p in output.penalties.values()), jnp.float32(0))
    return totals, weights, penalties


def mean_loss(sums: tuple[Any, Any], weights: Mapping[str, jax.Array]) -> Any:
    """Returns the loss that is differentiated, float32; for named losses a dict.

    Args:
        sums: each loss's weighted sum, and the penalties' sum.
        weights: each loss's sum of weights.
    """
    totals, penalty = sums
    values = {name: totals[name] * safe_inverse(weights[name]) + penalty for name in totals}
    return values[ONLY_LOSS] if list(values) == [ONLY_LOSS] else values


def run_checks(checks: Mapping[str, Check], weights: Any) -> tuple[jax.Array, jax.Array]:
    """Runs the checks on all examples with a nonzero weight.

    Args:
        checks: the checks by batch key.
        weights: the weights of the task's output, (batch, ...), or several such arrays; an example
            is checked if any of its weights is not 0.

    Returns:
        1 + the index of the first check that fails, in the order of the names, 0 for none: int32
        scalar; and a value that is out of range: float32 scalar.
    """
    number, value = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    for index, (_, check) in enumerate(sorted(checks.items()), start=1):
        values = check.values
        counts = jnp.zeros(values.shape[:1], bool)
        for each in jax.tree.leaves(weights):
            counts |= (each != 0).reshape(len(each), -1).any(-1)
        out = is_out_of_range(check, values)
        bad = (out & counts.reshape(-1, *[1] * (values.ndim - 1))).ravel()
        first = bad.any() & (number == 0)
        number = jnp.where(first, index, number)
        # The smallest bad value, and not the first one: indexing into a sharded batch would gather
        # it on every device. `min` propagates NaN, which is out of range as well.
        wrong = jnp.where(bad, values.ravel().astype(jnp.float32), jnp.inf)
        value = jnp.where(first, jnp.min(wrong, initial=jnp.inf), value)
    return number, value


def is_out_of_range(check: Check, values: Any) -> Any:
    """Returns for each value whether it is out of the range of a check; NaN always is.

    Args:
        check: the check; its `values` are not used.
        values: a JAX or numpy array.
    """
    slack = _ROUNDING
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        slack = 0
        # A limit such as 999 or -1 cannot be converted to uint8 for the comparison.
        values = values.astype(np.int64 if isinstance(values, np.ndarray) else jnp.int32)
    # The negation of "in range", and not "below or above": every comparison with NaN is false.
    bad = ~((values >= check.low - slack) & (values <= check.high + slack))
    return bad if check.ignored is None else bad & (values != check.ignored)


def compute_metrics(metrics: Any) -> Any:
    """Returns the computed values of a tree of metrics; collections become dicts."""
    return jax.tree.map(_compute, metrics, is_leaf=is_metric)


def _compute(metric: Any) -> Any:
    try:
        return metric.compute()
    except Exception as error:
        # A collection does not say which of its metrics has failed, so each is tried alone.
        for name, each in metrics_by_name(metric):
            try:
                each.compute()
            except Exception:
                error.add_note(f'Raised while computing the metric {name!r}')
        raise
