# SPDX-License-Identifier: Apache-2.0
"""The part of an evaluation that runs on the host: its score and its collecting metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.evaluate.host_rows import COLLECTED, AllRows, Arrays, gather_rows
from trainer.evaluate.prediction import Prediction
from trainer.evaluate.score import Score, discard, is_streaming, list_arrays
from trainer.evaluate.step import EvalStep
from trainer.input.batch import LoadedBatch
from trainer.input.structure import Structure
from trainer.modules.reuse import reuse_calls
from trainer.observe.summaries import with_summaries
from trainer.parallel import processes
from trainer.parallel.handshake import EXIT_PEER_FAILED
from trainer.parallel.messages import Messages
from trainer.tasks.collecting import Collecting, compute_collected
from trainer.tasks.measured import MetricValues
from trainer.tasks.runner import MASK

# Names of gathered arrays, besides those of metrics: what the task predicts, fields of the batch.
_PREDICTED, _FIELD = 'predicted/', 'field/'


class MainScoreError(UserError):
    """The main process could not compute a score; all processes have stopped because of it."""

    exit_code = EXIT_PEER_FAILED


@dataclasses.dataclass(frozen=True)
class StepWithRows:
    """The evaluation of one batch that also returns the rows for the host.

    One program computes both, so that the compiler merges what they have in common: usually the
    model.

    Attributes:
        step: accumulates the metrics.
        prediction: the task's predictions, if there is a score.
    """

    step: EvalStep
    prediction: Prediction | None

    def __call__(
        self, totals: Any, variables: Any, step: jax.Array, index: jax.Array, batch: Any
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Returns the accumulators with this batch added, and its rows, padding included."""
        args = (variables, step, index, batch)
        predicted: dict[str, jax.Array] = {}
        # The model is called once where that is possible: tracing a large one takes long.
        with reuse_calls():
            if self.prediction is not None and self.step.predicts_in_run:
                output, outputs = self.step.run_and_predict(*args)
                predicted = self.prediction.without_unchanged(outputs, batch)
            else:
                output = self.step.run(*args)
                if self.prediction is not None:
                    predicted = self.prediction(*args)
        rows = {}
        for metric, arrays in self.step.task.collect(output).items():
            rows.update({f'{COLLECTED}{metric}/{name}': x for name, x in arrays.items()})
        # The mask is known on the host already: ids of padding are negative.
        rows.update({f'{_PREDICTED}{name}': x for name, x in predicted.items() if name != MASK})
        return self.step(totals, *args, output), rows


class HostScores:
    """Computes the score and the collecting metrics of one pass over a split.

    Rows go to the main process batch by batch. It alone computes; an error there is raised at the
    end, in all processes, because the others take part in every batch.
    """

    def __init__(
        self,
        evaluation: str,
        collecting: Collecting,
        score: Score | None,
        *,
        by_id: bool,
        structure: Structure | None = None,
    ):
        """Creates the score of this pass.

        Args:
            evaluation: its name, for messages.
            collecting: names and classes of the collecting metrics.
            score: of the config, if there is one.
            by_id: whether ids are positions in the split.
            structure: of nested batches.
        """
        self._structure = structure
        self._evaluation = evaluation
        self._collecting = collecting
        self._score = score
        self._messages = Messages()
        self._rows = AllRows(by_id=by_id)
        self._error: Exception | None = None
        self._function: Any = None
        if score is not None and processes.is_main_process():
            self._try(self._make_function)

    def add(
        self, rows: Mapping[str, jax.Array], unchanged: Mapping[str, str], batch: LoadedBatch
    ) -> None:
        """Adds the rows of a batch; all processes must call it.

        Args:
            rows: of `StepWithRows`.
            unchanged: predictions that are a field of the batch, unchanged: output to field.
            batch: the batch that they were computed from.
        """
        requested = () if self._score is None else self._score.fields
        names = {name: None for field in requested for name in list_arrays(field, batch.host)}
        # A field that is also predicted under its own name, unchanged, is sent once.
        fields = [name for name in names if unchanged.get(name) != name]
        host = {f'{_FIELD}{name}': batch.host[name] for name in fields}
        host.update({f'{_PREDICTED}{output}': batch.host[n] for output, n in unchanged.items()})
        gathered = gather_rows(self._messages, rows, host, batch)
        # After an error the rows are still gathered, but no longer used: the other processes do not
        # know of it yet.
        if gathered is None or self._error is not None:
            return
        ids, arrays = gathered
        if is_streaming(self._function):
            self._try(lambda: self._function(self._examples(arrays)) if len(ids) else None)
            # What a streaming score has seen is not kept.
            arrays = {name: x for name, x in arrays.items() if name.startswith(COLLECTED)}
        self._rows.add(ids, arrays)

    def _make_function(self) -> None:
        assert self._score is not None
        self._function = self._score.make()

    def finish(self, measured: MetricValues) -> MetricValues:
        """Returns the values of the evaluation, those of the host included.

        All processes must call it.

        Args:
            measured: what the devices have measured; changed.

        Returns:
            `measured` with the values of the host. Of these, arrays, texts and images are in the
            main process only.

        Raises:
            MainScoreError: in the other processes, if the main process has failed.
        """
        if processes.is_main_process() and self._error is None:
            self._try(lambda: self._compute(measured))
        failure = None if self._error is None else f'{type(self._error).__name__}: {self._error}'
        # Together, so that all processes either get the values or raise.
        numbers, failure = self._messages.broadcast((dict(measured), failure))
        if self._error is not None:
            raise self._error
        if failure is not None:
            raise MainScoreError(
                f'config.evals.{self._evaluation}: its metrics could not be computed in process 0: '
                f'{failure}'
            )
        measured.update(numbers)
        return measured

    def discard(self) -> None:
        """Ends a streaming score that has not been closed, without its values."""
        function, self._function = self._function, None
        discard(function)

    def _compute(self, measured: MetricValues) -> None:
        arrays = self._rows.join()
        for name, kind in self._collecting:
            collected = _with_prefix(arrays, f'{COLLECTED}{name}/')
            measured.add(name, compute_collected(kind, collected))
        if self._score is None:
            return
        # From here on it has been closed, even if that fails.
        function, self._function = self._function, None
        values = function.close() if is_streaming(function) else function(self._examples(arrays))
        if not isinstance(values, Mapping):
            raise UserError(
                f'the score returned {type(values).__name__}; expected a dict '
                "of values by name, such as {'auc': 0.9}"
            )
        for name, value in values.items():
            measured.add(str(name), with_summaries(str(name), value))

    def _examples(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Returns what the score gets: predictions by name, and the fields that it asks for."""
        predicted, given = _with_prefix(arrays, _PREDICTED), _with_prefix(arrays, _FIELD)
        whole = {**predicted, **given}
        assert self._score is not None
        fields = {
            field: whole[field]
            if field in whole or self._structure is None
            else self._structure.select(field).rebuild(whole)
            for field in self._score.fields
        }
        return {**predicted, **fields}

    def _try(self, act: Any) -> None:
        try:
            act()
        except UserError as error:
            self._error = UserError(f'config.evals.{self._evaluation}: {error}')
            self._error.__cause__ = error
        except Exception as error:
            error.add_note(f'This happened on the host, in config.evals.{self._evaluation}')
            self._error = error
        if self._error is not None and jax.process_count() == 1:
            raise self._error


def _with_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    """Returns the arrays whose names have a prefix, without it."""
    return {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
