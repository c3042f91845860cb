# SPDX-License-Identifier: Apache-2.0
"""Monitors that run at a run's events: captures and the non-finite guard."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax

from trainer.input.batch import LoadedBatch
from trainer.input.prefetch import Prefetcher
from trainer.inspect.capture import Captures
from trainer.inspect.forward import Forward
from trainer.inspect.replay import Look, Replay
from trainer.inspect.stop_guard import Watch
from trainer.inspect.warn_guard import Guard
from trainer.observe.reporter import Reporter
from trainer.parallel import processes
from trainer.step.state import TrainState

if TYPE_CHECKING:
    from trainer.run.setup import Parts


class Probes:
    """The captures and the guard of a run."""

    def __init__(self, parts: Parts, report: Reporter | None = None):
        """Makes nothing yet.

        Args:
            parts: the run's programs, mesh, data and work directory.
            report: gets what is found.
        """
        self._parts = parts
        self._report = report

    def prepare(self) -> None:
        """Checks `config.capture` against the model, and starts compiling the monitors' programs.

        Raises:
            UserError: for a pattern that matches nothing.
        """
        if self._captures is not None:
            programs = self._parts.programs
            self._captures.prepare(programs.abstract, programs.fields.shapes)

        if self._watch is not None:
            _ = self._parts.programs.sweep

    def begin(self, step: int, state: TrainState) -> None:
        """Is told of the state that the run starts from."""
        if self._guard is not None:
            self._guard.keep(step, state)
        if self._watch is not None:
            self._watch.begin(step, state, self._place(step))

    def follow(self, batches: Prefetcher) -> None:
        """Sets the batches that the run reads from here on."""
        if self._watch is not None:
            self._watch.batches = batches

    def poll(self, state: TrainState) -> None:
        """Checks results of the last event if the devices have computed them; does not wait.

        Raises:
            NonFiniteError: see `config.guard`.
            UserError: if a label is out of its range.
        """
        if self._watch is not None:
            self._watch.poll(state)

    def is_sound(self, state: TrainState) -> bool:
        """Waits for a state, and returns whether it may be saved; see `check`."""
        return self._watch is None or self._watch.is_sound(state)

    def check(self, step: int, state: TrainState) -> None:
        """Waits for the state of a step, and checks that it may be evaluated and saved.

        Raises:
            NonFiniteError: see `config.guard`.
            UserError: if a label is out of its range.
        """
        if self._watch is not None:
            self._watch.check(step, state)

    def run(self, batch: LoadedBatch, step: int, state: TrainState) -> None:
        """Looks at a run at one of its events, before anything is evaluated or saved.

        Args:
            batch: the last one that the run has consumed.
            step: number of completed updates.
            state: at this step.

        Raises:
            NonFiniteError: see `config.guard`.
        """
        assert self._report is not None
        if self._guard is not None:
            self._report.flush()
            message = self._guard.check(step, state, self._report.latest)
            if message is not None:
                self._report.progress.message(message)
        if self._watch is not None:
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
        if self._parts.checkpoints is None or not self._parts.checkpoints.has(step):
            return None
        states = self._parts.checkpoints.meta(step).get('data_states')
        return states[jax.process_index()] if states else None

    @functools.cached_property
    def _forward(self) -> Forward:
        parts = self._parts
        return Forward.of(parts.experiment, parts.mesh, parts.programs.task)

    @functools.cached_property
    def _captures(self) -> Captures | None:
        captures, workdir = self._parts.experiment.captures, self._parts.workdir
        if not captures:
            return None
        writes = workdir is not None and processes.is_primary()
        return Captures(captures, self._forward, workdir.path if workdir and writes else None)

    @functools.cached_property
    def _guard(self) -> Guard | None:
        if self._parts.experiment.guard != 'warn':
            return None
        return Guard(Replay(self._parts, Look(self._parts, self._forward)))

    @functools.cached_property
    def _watch(self) -> Watch | None:
        if self._parts.experiment.guard != 'stop':
            return None
        say = self._report.progress.message if self._report else print
        return Watch(self._parts, Look(self._parts, self._forward), say)
