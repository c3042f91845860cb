# SPDX-License-Identifier: Apache-2.0
"""Optional monitors (captures, non-finite guard), run at the events of a run."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from trainer.checkpoint.manager import Checkpoints
from trainer.experiment import Experiment
from trainer.input.batch import LoadedBatch
from trainer.input.prefetch import Prefetcher
from trainer.inspect.capture import Captures
from trainer.inspect.forward import Forward
from trainer.inspect.replay import Reader, Replay, StepInspector
from trainer.inspect.stop_guard import StopGuard
from trainer.inspect.warn_guard import WarnGuard
from trainer.run.reporter import Reporter
from trainer.step.programs import Programs
from trainer.step.state import TrainState


class Monitors:
    """The captures and the guard of a run."""

    def __init__(
        self,
        experiment: Experiment,
        mesh: Mesh,
        programs: Programs,
        report: Reporter,
        *,
        checkpoints: Checkpoints | None,
        directory: epath.Path | None,
    ):
        """Creates the monitors of the config; nothing is compiled yet.

        Args:
            experiment: what is trained.
            mesh: the device mesh.
            programs: the training programs.
            report: receives captured values and messages.
            checkpoints: those of the work directory, or None without one.
            directory: where captures are written; None writes no files.
        """
        self._programs = programs
        self._checkpoints = checkpoints
        self._report = report
        self._captures: Captures | None = None
        self._warn_guard: WarnGuard | None = None
        forward = Forward.from_experiment(experiment, mesh, programs.task)
        if experiment.logging.captures:
            self._captures = Captures(experiment.logging.captures, forward, directory)
        reader = Reader(
            data=experiment.data,
            mesh=mesh,
            batch_size=experiment.clock.batch_size,
            fields=programs.fields,
        )
        inspector = StepInspector(experiment, mesh, programs, forward)
        if experiment.training.guard == 'warn':
            self._warn_guard = WarnGuard(Replay(programs, reader, inspector))
        # Also without 'stop': it is what checks labels.
        self._stop_guard = StopGuard(
            programs,
            reader,
            inspector,
            stops=experiment.training.guard == 'stop',
            ensemble=experiment.ensemble,
            checkpoints=checkpoints,
            show=report.progress.message,
        )

    def prepare(self) -> None:
        """Checks `config.capture` against the model, and starts compiling the monitors' programs.

        Raises:
            UserError: for a pattern that matches nothing.
        """
        if self._captures is not None:
            self._captures.prepare(self._programs.abstract, self._programs.fields.shapes)
        # Started last: the train step is needed first, and programs are compiled in the order of
        # these calls.
        self._programs.sweep.start()

    def begin(self, step: int, state: TrainState) -> None:
        """Sets the state that the run starts from."""
        if self._warn_guard is not None:
            self._warn_guard.keep(step, state)
        self._stop_guard.begin(step, state, self._stream_position(step))

    def follow(self, batches: Prefetcher) -> None:
        """Sets the prefetcher that the run reads from here on."""
        self._stop_guard.batches = batches

    def poll(self, state: TrainState) -> None:
        """Checks results of the last event if the devices have computed them; does not wait.

        Raises:
            NonFiniteError: see `config.guard`.
            UserError: if a label is out of its range.
        """
        self._stop_guard.poll(state)

    def is_finite(self, state: TrainState) -> bool:
        """Waits for a state, and returns whether it is finite and may be saved."""
        return self._stop_guard.is_finite(state)

    def check(self, step: int, state: TrainState) -> None:
        """Waits for the state of a step, and checks it before it is evaluated and saved.

        Raises:
            NonFiniteError: see `config.guard`.
            UserError: if a label is out of its range.
        """
        self._stop_guard.check(step, state)

    def check_labels(self, state: TrainState) -> None:
        """Waits for a state, and raises if a step has found a label out of range.

        Raises:
            UserError: naming the label.
        """
        self._stop_guard.check_labels(state)

    def run(self, batch: LoadedBatch, step: int, state: TrainState) -> None:
        """Runs the monitors at an event, before anything is evaluated or saved.

        Args:
            batch: the last batch that the run has consumed.
            step: number of completed updates.
            state: train state after this step.

        Raises:
            NonFiniteError: see `config.guard`.
            UserError: if a label is out of its range.
        """
        if self._warn_guard is not None:
            self._report.flush()
            # The labels first: one that is out of range is the cause of what the guard would find.
            self._stop_guard.check(step, state)
            message = self._warn_guard.check(step, state, self._report.latest)
            if message is not None:
                self._report.progress.message(message)
        self._stop_guard.start_check(step, state, batch.state)
        due = self._captures.names_due(step) if self._captures is not None else []
        if due and self._captures is not None:
            # Wait for queued steps first: their time is not that of the capture.
            self._report.flush()
            with self._report.time.measure('eval'):
                captured = self._captures.run(
                    due, step, state, batch.arrays, stacked=batch.count > 1
                )
                self._report.record_capture(step, captured.row, captured.histograms)
            if captured.message is not None:
                self._report.progress.message(captured.message)

    def _stream_position(self, step: int) -> Any:
        """Returns the position of a stream at the checkpoint that the run starts from, or None."""
        if self._checkpoints is None or not self._checkpoints.has(step):
            return None
        states = self._checkpoints.meta(step).get('data_states')
        # Each process has its own position in a stream.
        return states[jax.process_index()] if states else None
