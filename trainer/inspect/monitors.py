# SPDX-License-Identifier: Apache-2.0
"""Monitors that run at a run's events: captures and the non-finite guard."""

from __future__ import annotations

from typing import Any

import jax

from trainer.input.batch import LoadedBatch
from trainer.input.prefetch import Prefetcher
from trainer.inspect.capture import Captures
from trainer.inspect.forward import Forward
from trainer.inspect.replay import Look, Reader, Replay
from trainer.inspect.stop_guard import Watch
from trainer.inspect.warn_guard import Guard
from trainer.parallel import processes
from trainer.run.reporter import Reporter
from trainer.run.setup import Run, Setup
from trainer.step.state import TrainState


class Monitors:
    """The captures and the guard of a run."""

    def __init__(self, run: Run, setup: Setup, report: Reporter):
        """Makes the monitors that the config asks for; nothing is compiled yet.

        Args:
            run: whose experiment, data, checkpoints and work directory.
            setup: its mesh and programs.
            report: gets what is found.
        """
        experiment, programs = run.experiment, setup.programs
        self._programs = programs
        self._checkpoints = run.checkpoints
        self._report = report
        self._captures: Captures | None = None
        self._guard: Guard | None = None
        forward = Forward.of(experiment, setup.mesh, programs.task)
        if experiment.logging.captures:
            writes = run.workdir is not None and processes.is_primary()
            directory = run.workdir.path if run.workdir and writes else None
            self._captures = Captures(experiment.logging.captures, forward, directory)
        reader = Reader(
            data=experiment.data,
            mesh=setup.mesh,
            batch_size=experiment.clock.batch_size,
            fields=programs.fields,
        )
        look = Look(experiment, setup, forward)
        if experiment.training.guard == 'warn':
            self._guard = Guard(Replay(programs, reader, look))
        self._watch = Watch(
            programs,
            reader,
            look,
            stops=experiment.training.guard == 'stop',
            ensemble=experiment.ensemble,
            checkpoints=run.checkpoints,
            say=report.progress.message,
        )

    def prepare(self) -> None:
        """Checks `config.capture` against the model, and starts compiling the monitors' programs.

        Raises:
            UserError: for a pattern that matches nothing.
        """
        if self._captures is not None:
            self._captures.prepare(self._programs.abstract, self._programs.fields.shapes)
        self._programs.sweep.start()

    def begin(self, step: int, state: TrainState) -> None:
        """Is told of the state that the run starts from."""
        if self._guard is not None:
            self._guard.keep(step, state)
        self._watch.begin(step, state, self._place(step))

    def follow(self, batches: Prefetcher) -> None:
        """Sets the batches that the run reads from here on."""
        self._watch.batches = batches

    def poll(self, state: TrainState) -> None:
        """Checks results of the last event if the devices have computed them; does not wait.

        Raises:
            NonFiniteError: see `config.guard`.
            UserError: if a label is out of its range.
        """
        self._watch.poll(state)

    def is_sound(self, state: TrainState) -> bool:
        """Waits for a state, and returns whether it may be saved; see `check`."""
        return self._watch.is_sound(state)

    def check(self, step: int, state: TrainState) -> None:
        """Waits for the state of a step, and checks that it may be evaluated and saved.

        Raises:
            NonFiniteError: see `config.guard`.
            UserError: if a label is out of its range.
        """
        self._watch.check(step, state)

    def check_labels(self, state: TrainState) -> None:
        """Waits for a state, and checks the labels that its steps have found.

        Raises:
            UserError: if one is out of its range.
        """
        self._watch.check_labels(state)

    def run(self, batch: LoadedBatch, step: int, state: TrainState) -> None:
        """Looks at a run at one of its events, before anything is evaluated or saved.

        Args:
            batch: the last one that the run has consumed.
            step: number of completed updates.
            state: at this step.

        Raises:
            NonFiniteError: see `config.guard`.
            UserError: if a label is out of its range.
        """
        if self._guard is not None:
            self._report.flush()
            # First: a label out of range would explain what the guard finds.
            self._watch.check(step, state)
            message = self._guard.check(step, state, self._report.latest)
            if message is not None:
                self._report.progress.message(message)
        self._watch.note(step, state, batch.state)
        due = self._captures.due(step) if self._captures is not None else []
        if due and self._captures is not None:
            # What is still queued is the steps' time, not the capture's.
            self._report.flush()
            with self._report.time.spent('eval'):
                captured = self._captures.run(
                    due, step, state, batch.arrays, stacked=batch.count > 1
                )
                self._report.captured(step, captured.row, captured.histograms)
            if captured.message is not None:
                self._report.progress.message(captured.message)

    def _place(self, step: int) -> Any:
        """Returns where a stream stood at the checkpoint that the run starts from."""
        if self._checkpoints is None or not self._checkpoints.has(step):
            return None
        states = self._checkpoints.meta(step).get('data_states')
        return states[jax.process_index()] if states else None
