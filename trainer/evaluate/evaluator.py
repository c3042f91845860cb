# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a whole split: every example once, for any batch size and number of devices."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax.errors import InvalidRngError, ModifyScopeVariableError
from jax.sharding import Mesh

from trainer.config.errors import UserError
from trainer.evaluate.host_scores import HostScores, StepWithRows
from trainer.evaluate.model_form import find_fresh_collections
from trainer.evaluate.prediction import Prediction
from trainer.evaluate.score import Score, check_fields, check_names, list_arrays
from trainer.evaluate.step import EMA, EvalStep
from trainer.input.batch import LoadedBatch
from trainer.input.data import EvalData
from trainer.input.fields import Fields
from trainer.input.prefetch import Prefetcher
from trainer.modules import seen
from trainer.modules.shapes import describe
from trainer.observe.summaries import Summary
from trainer.parallel import processes
from trainer.parallel.host import fetch
from trainer.parallel.mesh import batch_sharding, replicated_sharding
from trainer.parallel.messages import Messages
from trainer.parallel.sharding import Rule, named_axes
from trainer.step.health import FINDINGS
from trainer.step.programs import Program, make_program
from trainer.step.state import TrainState
from trainer.tasks.bad_values import describe_bad_value
from trainer.tasks.batch import record_reads
from trainer.tasks.measured import (
    MetricValues,
    average_members,
    check_computes,
    compute_on_trial,
    is_member_name,
)
from trainer.tasks.returned import name_of
from trainer.tasks.runner import MASK, compute_metrics
from trainer.tasks.summaries import create_summaries


class Stopped(Exception):
    """An evaluation was stopped before it had seen the whole split."""


class Evaluator:
    """Runs an EvalStep over all batches of a loader, compiled once.

    Attributes:
        name: the evaluation's name in the config.
        path: what messages name.
        step: evaluates one batch.
        data: the batches of the split.
    """

    def __init__(
        self,
        name: str,
        step: EvalStep,
        data: EvalData,
        mesh: Mesh,
        *,
        sharding: Sequence[Rule] = (),
        use_ema: bool = False,
        params: Callable[[TrainState], Any] = operator.attrgetter('params'),
        score: Score | None = None,
        own_model: bool = False,
        path: str | None = None,
    ):
        """Creates an evaluator, which compiles at its first batch.

        Args:
            name: the evaluation's name in the config.
            step: evaluates one batch.
            data: batches of one static shape, with a mask.
            mesh: the device mesh.
            sharding: the rules of `config.sharding`, for activations with named axes.
            use_ema: whether to evaluate the moving average of the parameters.
            params: returns the parameters of a state to evaluate, unless `use_ema`.
            score: computed on the host from the predictions for all examples, or None.
            own_model: whether the step has another form of the model than training.
            path: what messages name; by default the evaluation's path in the config.

        Raises:
            UserError: if the split is empty, or has not the fields that the score asks for.
        """
        self.path = f'config.evals.{name}' if path is None else path
        self._data_path = f'{self.path}.data' if path is None else path
        if data.num_batches == 0:
            hint = '; use one with examples, or remove this evaluation' if path is None else ''
            raise UserError(f'{self._data_path}: the split is empty{hint}')
        self.name = name
        self.data = data
        # By the members of an ensemble that have not diverged.
        self._programs: dict[tuple[int, ...], Program] = {}
        self._summarizers: dict[tuple[int, ...], Program] = {}
        # Set by `prepare`: whether the task returns summaries.
        self._has_summaries = False
        self._empty: Callable[[], Any] | None = None
        self._trial_metrics: MetricValues | None = None
        self.step = step
        # Set by `prepare`: the batch fields that the task reads, and the step for such batches.
        self._fields: Fields | None = None
        self._run_step = step
        self._predicts: Prediction | None = None
        self._mesh = mesh
        self._tracing = functools.partial(named_axes, sharding, mesh)
        self._use_ema = use_ema
        self._params = params
        self._score = score
        self._own_model = own_model
        if score is not None:
            check_fields(score, data.spec, data.rows)

    def prepare(self, state: TrainState) -> None:
        """Prepares `run`, so that mistakes are found before training starts.

        Reads and transforms one batch and traces the task's shapes; nothing is compiled.

        Args:
            state: the state that will be evaluated, or its shapes.

        Raises:
            UserError: if the task reads a field that the batch does not have, the model drops or
                updates statistics as in training, or a metric cannot be accumulated or computed.
        """
        with self._explain_training_errors():
            output = self._output_shapes(state)
        ensemble_output = output[0] if isinstance(output, tuple) else output
        self._has_summaries = bool(ensemble_output.summaries)
        # Replicated, like the results of the step: it donates the totals, and a donated buffer is
        # reused only for a result of the same shape and sharding.
        self._empty = jax.jit(
            functools.partial(self.step.empty, output),
            out_shardings=replicated_sharding(self._mesh),
        )
        # From shapes alone: a metric that cannot be computed is found before training starts.
        self._trial_metrics = self._check_metrics()
        with self._add_name_to_errors():
            jax.eval_shape(self.step.task.collect, ensemble_output)
        if self._score is not None:
            prediction = self._trace_prediction(state)
            check_names(self._score, prediction.computed, prediction.unchanged)

    def _check_metrics(self) -> MetricValues | None:
        assert self._empty is not None
        with self._add_name_to_errors():
            empty = jax.eval_shape(self._empty)
            check_computes(empty['task'])
            return compute_on_trial(summarize, empty)

    @contextlib.contextmanager
    def _add_name_to_errors(self) -> Iterator[None]:
        """Adds the name of the evaluation to errors in its metrics."""
        try:
            yield
        except UserError as error:
            raise self._with_path(error) from error
        except Exception as error:
            error.add_note(f'This happened in the metrics of {self.path}')
            raise

    def _with_path(self, error: UserError) -> UserError:
        """Returns the error with the path of the evaluation, once."""
        text = str(error)
        return UserError(text if text.startswith(f'{self.path}.') else f'{self.path}: {text}')

    def _output_shapes(self, state: TrainState) -> Any:
        shapes = None
        try:
            fields = self._all_fields
            shapes = fields.shapes
            # Fields that devices cannot store are placeholders while the task is traced. Afterwards
            # the fields that it has not read stay on the host too, which saves their transfer.
            step, task = self._step_for_data(), self.step.task
            step = dataclasses.replace(step, task=task.with_host_fields(fields.host_fields()))
            with self._tracing(), record_reads() as reads, seen.explain_errors():
                # The evaluated parameters, averaged or not, have the shapes of `params`.
                variables = {**state.variables, EMA: state.average}
                if self._own_model:
                    step = self._with_fresh_collections(step, variables, shapes)
                output = step.output_shapes(variables, shapes)
            self._fields = fields.with_read(reads.names, task.transforms)
            task = task.with_host_fields(self._fields.host_fields(), reads.weighted)
            self._run_step = dataclasses.replace(step, task=task)
            return output
        except UserError as error:
            raise UserError(f'{self.path}: {error}') from error
        except Exception as error:
            error.add_note(f'This happened at the first batch of {self.path}')
            # The task's own traceback does not say what the batch looked like.
            if shapes is not None:
                batch = ', '.join(f'{name}: {describe(x)}' for name, x in shapes.items())
                name = name_of(self.step.task.task)
                error.add_note(f'Its task {name} was called with the batch {batch}')
            raise

    def _step_for_data(self) -> EvalStep:
        """Returns the step, for batches of the structure that the data has."""
        # Not in the constructor, because it reads the first batch.
        task = self.step.task.with_structure(self.data.structure)
        self.step = dataclasses.replace(self.step, task=task)
        return self.step

    def _with_fresh_collections(self, step: EvalStep, variables: Any, shapes: Any) -> EvalStep:
        with record_reads():  # In a record of its own: initialization is not a step.
            fresh = find_fresh_collections(step, variables, shapes)
        self.step = self.step.with_fresh(fresh)
        return step.with_fresh(fresh)

    @functools.cached_property
    def _all_fields(self) -> Fields:
        return Fields.from_spec(self.data.spec, self._data_path, num_shapes=self.data.num_shapes)

    def check_metric(self, name: str, path: str) -> None:
        """Checks that `run` will return a metric; `prepare` must have been called.

        Args:
            name: such as 'accuracy'.
            path: the config path that names it, for the message.

        Raises:
            UserError: if there is no such metric, naming the available ones.
        """
        metrics = self._trial_metrics
        if metrics is None or name in metrics or self._is_host_metric(name):
            return
        if name in metrics.arrays:
            kind = describe(metrics.arrays[name])
            raise UserError(
                f'{path}: {name!r} of evaluation {self.name!r} is not a number but {kind}'
            )
        have = ', '.join([*metrics, *(name for name, _ in self.step.task.collecting)])
        raise UserError(f'{path}: evaluation {self.name!r} has no {name!r}; it has {have}')

    def _is_host_metric(self, name: str) -> bool:
        """Whether the host may compute a value of this name; known only after its first run."""
        collecting = (metric for metric, _ in self.step.task.collecting)
        return self._score is not None or name.split('/')[0] in collecting

    def run(
        self,
        state: TrainState,
        *,
        max_batches: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> MetricValues:
        """Returns the metrics over the split, including `examples` (their number).

        Metrics that are not numbers are in its `arrays`.

        Args:
            state: the state to evaluate.
            max_batches: stop after this many batches, for a dry run.
            should_stop: called before each batch.

        Raises:
            Stopped: if `should_stop` returned True.
        """
        # In a dry run there are only some examples, and a score may need them all.
        host = self._host_scores() if max_batches is None else None
        try:
            return self._run(state, host, max_batches, should_stop)
        finally:
            if host is not None:
                host.discard()

    def _run(
        self,
        state: TrainState,
        host: HostScores | None,
        max_batches: int | None,
        should_stop: Callable[[], bool],
    ) -> MetricValues:
        if self._empty is None:
            self.prepare(state)
        assert self._empty is not None
        members = self._leave_out_diverged(state)
        variables, totals = self.variables(state), self._empty()
        prediction = None if self._score is None else self.prediction(state)
        unchanged = {} if prediction is None else prediction.unchanged
        pending: tuple[Any, LoadedBatch] | None = None
        summaries: dict[str, Summary] | None = None if self._has_summaries else {}
        # A context: leaving it by `Stopped` or an error ends the thread of the prefetcher.
        with self._batches(max_batches, **self._prefetch_options(prediction)) as batches:
            for batch in self._read_to_end(batches):
                if should_stop():
                    raise Stopped
                args = (totals, variables, state.step, np.int32(batch.start), batch.arrays)
                if members not in self._programs:
                    self._programs[members] = self._compile(args, prediction)
                # Nothing is fetched here: the batches are queued, and the devices add them up
                # without waiting for the host.
                totals, rows = self._programs[members](*args)
                if summaries is None:
                    summaries = self._summarize(members, args[1:])
                # The rows of a batch are read while the devices compute the next one.
                if host is not None and pending is not None:
                    host.add(pending[0], unchanged, pending[1])
                pending = None if host is None else (rows, batch)
        if host is not None and pending is not None:
            host.add(pending[0], unchanged, pending[1])
        # Before the metrics: with labels out of range they are wrong, or NaN.
        self._check_labels(totals, state)
        with self._add_name_to_errors():
            measured = summarize(totals, members)
            for name, summary in (summaries or {}).items():
                measured.add(name, summary)
        return measured if host is None else host.finish(measured)

    def _summarize(self, members: tuple[int, ...], args: tuple[Any, ...]) -> dict[str, Summary]:
        """Returns the summaries of the task for a batch, without padding; all processes call it."""
        if members not in self._summarizers:
            # In a separate program: that of the metrics would compute them for every batch.
            self._summarizers[members] = make_program(
                f'the summaries of evaluation {self.name!r}',
                self._run_step.summarize,
                args,
                num_shapes=self.data.num_shapes,
                where=self._data_path,
                tracing=self._tracing,
                # All processes have all rows: those of one batch are few.
                out_shardings=replicated_sharding(self._mesh),
            )
        summaries, mask = fetch(self._summarizers[members](*args))
        # Like those of a score: the main process alone writes files.
        return create_summaries(summaries, mask) if processes.is_main_process() else {}

    def _host_scores(self) -> HostScores | None:
        """Returns what the host computes in one run, or None if that is nothing."""
        collecting = self.step.task.collecting
        if self._score is None and not collecting:
            return None
        by_id = self.data.num_batches is not None
        return HostScores(
            self.name, collecting, self._score, by_id=by_id, structure=self.data.structure
        )

    def _prefetch_options(self, prediction: Prediction | None) -> dict[str, Any]:
        """Returns which fields of a batch are sent to the devices, and which stay on the host."""
        if prediction is None or self._score is None or self._fields is None:
            return {'fields': self._fields}
        sent = self._all_fields.with_sent(self._fields.sent | prediction.fields.sent)
        fields = {n for field in self._score.fields for n in list_arrays(field, self.data.spec)}
        return {'fields': sent, 'host': {*prediction.unchanged.values(), *fields}}

    def _leave_out_diverged(self, state: TrainState) -> tuple[int, ...]:
        """Leaves diverged members out of an ensemble, unless all have diverged.

        A change compiles the step again.

        Returns:
            The indices of the remaining members; empty for all.
        """
        if state.health is not None:
            step = self.step.without_diverged(state.health)
            if step.counted != self.step.counted:
                self.step = step
                self._run_step = dataclasses.replace(self._run_step, counted=step.counted)
                self._predicts = None
                # The cached property was compiled with the members before the change.
                vars(self).pop('_predict', None)
        return self.step.counted

    def _check_labels(self, totals: Any, state: TrainState) -> None:
        """Raises a UserError if a label of the split was out of its range."""
        findings = fetch(totals[FINDINGS])
        if not findings.label:
            return
        output = self._output_shapes(state)
        # The devices report only the number of the check and the value. The split is read again to
        # name the example, which costs nothing unless there is an error.
        checks = (output[0] if isinstance(output, tuple) else output).checks
        count = self.data.num_batches
        numbers = itertools.count() if count is None else range(count)
        blocks: Iterable[Any] = (self.data.block(i, 1) for i in numbers)
        if count is None:  # After its end, a stream yields padding, with negative ids.
            blocks = itertools.takewhile(lambda block: (block.ids >= 0).any(), blocks)
        number, value = int(findings.label) - 1, float(findings.value)
        numbered = count is not None
        raise UserError(
            describe_bad_value(
                self.path, 'of its split', checks, number, value, blocks, numbered=numbered
            )
        )

    def predict(self, state: TrainState) -> Iterator[dict[str, np.ndarray]]:
        """Yields the task's predictions for each batch, without padding.

        A batch field that the task returns unchanged comes from the loader as it is, including text
        and 64-bit integers. Of several processes, only the main process gets such fields.

        Raises:
            UserError: if a task without a method `predict` has no output of the model to predict.
        """
        variables, prediction = self.variables(state), self.prediction(state)
        # Several outputs may be the same field.
        host, messages = tuple(set(prediction.unchanged.values())), Messages()
        with self._batches(fields=prediction.fields, host=host) as batches:
            for batch in self._read_to_end(batches):
                args = (variables, state.step, np.int32(batch.start), batch.arrays)
                with self._tracing(), self._explain_training_errors():
                    outputs = self._predict(*args)
                # One transfer for all outputs, in every process: they are replicated.
                outputs = fetch(outputs)
                mask = outputs.pop(MASK)
                whole = {name: x[mask] for name, x in outputs.items()}
                whole.update(prediction.gather_unchanged(messages, batch))
                # Sorted, so that files and messages list them in the same order whatever the task
                # does.
                yield {name: whole[name] for name in sorted(whole)}

    def prediction(self, state: TrainState) -> Prediction:
        """Returns the traced `predict` of the task.

        Raises:
            UserError: if the task computes with a field that devices cannot store, or has no method
                `predict` and no output of the model in its place.
        """
        self._leave_out_diverged(state)
        return self._trace_prediction(state)

    def _trace_prediction(self, state: TrainState) -> Prediction:
        if self._predicts is None:
            with self._tracing(), self._explain_training_errors(), seen.explain_errors():
                variables = self.variables(state)
                try:
                    step = self._step_for_data()
                    self._predicts = Prediction.trace(step, self._all_fields, variables)
                except UserError as error:
                    raise UserError(f'{self.path}: {error}') from error
        return self._predicts

    @contextlib.contextmanager
    def _explain_training_errors(self) -> Iterator[None]:
        """Explains Flax errors of a model that behaves as in training while it is evaluated."""
        try:
            yield
        except (InvalidRngError, ModifyScopeVariableError) as error:
            raise UserError(
                f'{self.path}: the model drops values or updates statistics as in '
                f'training: {error}\nThe model must know whether it is training. Add an argument '
                '`train`, `training`, `is_training` or `deterministic` to its call or its '
                'constructor (the trainer sets it) and pass it on to the layers: see '
                'docs/tutorial.md'
            ) from error

    def variables(self, state: TrainState) -> dict[str, Any]:
        """Returns the variables to evaluate; under `EMA` those of a task's `model.ema`."""
        average = state.average
        params = average if self._use_ema else self._params(state)
        # The average has its own key, because a task may use both.
        return {**state.variables, 'params': params, EMA: average}

    @property
    def compiles(self) -> int:
        """Number of compilations so far."""
        return sum(program.compiles for program in self._programs.values())

    @property
    def compile_secs(self) -> float:
        """Seconds spent in the compilations so far."""
        programs = (*self._programs.values(), *self._summarizers.values())
        return sum(program.compile_secs for program in programs)

    def _compile(self, args: tuple[Any, ...], prediction: Prediction | None) -> Program:
        name = f'the step of evaluation {self.name!r}'
        return make_program(
            name,
            StepWithRows(self._run_step, prediction),
            args,
            num_shapes=self.data.num_shapes,
            where=self._data_path,
            tracing=self._tracing,
            donate_argnums=0,
            # Rows stay where they are: no device needs those of the others.
            out_shardings=(replicated_sharding(self._mesh), batch_sharding(self._mesh)),
        )

    @functools.cached_property
    def _predict(self) -> Callable[..., Any]:
        assert self._predicts is not None
        return jax.jit(
            functools.partial(self._predicts), out_shardings=replicated_sharding(self._mesh)
        )

    def _batches(self, max_batches: int | None = None, **options: Any) -> Prefetcher:
        # Unknown lengths are None; `_read_to_end` ends the iteration of those.
        limits = [n for n in (self.data.num_batches, max_batches) if n is not None]
        calls = itertools.repeat(1, min(limits)) if limits else itertools.repeat(1)
        data = self.data
        return Prefetcher(
            data.block,
            calls,
            self._mesh,
            data.rows,
            num_shapes=data.num_shapes,
            release=data.close,
            **options,
        )

    def _read_to_end(self, batches: Prefetcher) -> Iterator[LoadedBatch]:
        """Yields the batches; for data without a length, until no process has any example left.

        Processes that run out of examples earlier yield padding, because every process must take
        part in each batch.
        """
        for batch in batches:
            if self.data.num_batches is None:
                # One small collective per batch. Deciding alone would leave the other processes
                # waiting in the step.
                real = int((batch.ids >= 0).sum())
                if not processes.sum_over_processes(real):
                    return
            yield batch


def summarize(totals: Any, counted: Sequence[int] = ()) -> MetricValues:
    """Returns flat host values of an evaluation's accumulators, fetched in one transfer.

    For an ensemble, these include the means over its members ('members/loss') and the values of
    each member ('member_0/loss').

    Args:
        totals: the accumulators.
        counted: indices of the members that the means include; empty for all.
    """
    # The findings are not metrics: `_check_labels` has read them.
    computed = compute_metrics(fetch({n: x for n, x in totals.items() if n != FINDINGS}))
    row = MetricValues(computed['task'])
    row.add('examples', computed['examples'])
    if 'members' in computed:
        every = average_members([MetricValues(each) for each in computed['members']], counted)
        for name, value in {**every, **every.arrays}.items():
            row.add(name if is_member_name(name) else f'members/{name}', value)
    return row
