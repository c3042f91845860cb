# SPDX-License-Identifier: Apache-2.0
"""The training loop. Read `Trainer.fit` top to bottom and you know what a run does."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from trainer import startup
from trainer.checkpoint import manager as checkpoint
from trainer.config.errors import UserError
from trainer.evaluate.evaluator import Evaluator, EvalStep
from trainer.events import Event, Events
from trainer.experiment import Experiment
from trainer.observe.reporter import Reporter
from trainer.parallel.mesh import batch_sharding, batch_shards, make_mesh
from trainer.parallel.signals import StopRequest
from trainer.prefetch import Prefetcher
from trainer.step.program import Programs
from trainer.step.state import TrainState
from trainer.step.train_step import TrainStep
from trainer.workdir import Workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How a call of `fit` ended.

    Attributes:
        status: 'finished', 'preempted' (SIGTERM), 'interrupted' (Ctrl-C) or 'paused' (`max_steps`).
        step: number of completed updates.
        metrics: the newest value of each metric, by its flat name ('eval/test/accuracy').
        state: the state at `step`.
    """

    status: str
    step: int
    metrics: Mapping[str, float]
    state: TrainState


class Trainer:
    """Trains, evaluates and predicts with one experiment in one work directory.

    From Python or a notebook::

        experiment = build(load('configs/mnist.py'))
        trainer = Trainer(experiment, '/tmp/mnist')
        trainer.fit(max_steps=100)
        trainer.evaluate()

    It installs no signal handlers and never ends the process; `trainer.main` does that.

    Attributes:
        experiment: what is trained.
        workdir: the run's directory, or None: then nothing is written.
    """

    def __init__(
        self, experiment: Experiment, workdir: str | None = None, *, stop: StopRequest | None = None
    ):
        """Prepares a run; nothing is computed before a method is called.

        Args:
            experiment: from `trainer.experiment.build`.
            workdir: where checkpoints, metrics and results go; None for a run that leaves no trace.
            stop: when its `signal` is set, `fit` saves and returns after the current step.
        """
        self.experiment = experiment
        self.workdir = None if workdir is None else Workdir(workdir)
        self._stop = stop or StopRequest()

    # ---- the run -----------------------------------------------------------------------------

    def fit(self, *, max_steps: int | None = None) -> Result:
        """Trains until `train_for`, from the newest checkpoint of the work directory if it has one.

        Args:
            max_steps: stop after this many updates in this call, without a final evaluation.

        Raises:
            UserError: for what only shows now, such as a batch that does not divide over the mesh.
        """
        experiment, report = self.experiment, self.reporter
        with report.spent('compile'):
            state, step = self._start()
        total = experiment.total_steps
        last = total if max_steps is None else min(total, step + max_steps)
        report.begin(step, self._describe(step))

        events = Events.of(experiment, total)
        due = events.next_due(step)
        calls = events.calls(step, last, experiment.steps_per_call)
        self._notify('start', step, state)
        with self._batches(step, calls) as batches:
            for count, batch in batches:
                program = self.programs.step if count == 1 else self.programs.fused
                state = program(state, batch)
                step += count
                report.stepped(step, batches.wait_secs)
                if step == due:
                    state = self._run_events(events, step, state, batches)
                    due = events.next_due(step)
                if self._stop.signal is not None:
                    break
            self._count_data(batches, step)
        return self._finish(state, step, total)

    def _run_events(
        self, events: Events, step: int, state: TrainState, batches: Prefetcher
    ) -> TrainState:
        """Runs what is due after this step, in the order log, eval, save."""
        report = self.reporter
        if events.log.due(step):
            # The row is written after a later step was dispatched: see Reporter.stepped.
            report.log(step, state.metrics)
            state = state.replace(metrics=self.programs.empty_metrics())
            self._notify('log', step, state)
        for name, periodic in events.evals.items():
            if periodic.due(step):
                self._evaluate_one(self.evaluators[name], step, state)
        if events.save.due(step):
            self._count_data(batches, step)
            self._save(step, state)
        return state

    def _finish(self, state: TrainState, step: int, total: int) -> Result:
        """Final evaluation, final save, result; or only a save, if the run was cut short."""
        if step < total:
            status = {None: 'paused', 2: 'interrupted'}.get(self._stop.signal, 'preempted')
            if self._stop.signal is not None:
                self._save(step, state)
        else:
            status = 'finished'
            for name, evaluator in self.evaluators.items():
                if self.experiment.evals[name].final and not self.reporter.has_eval(name, step):
                    self._evaluate_one(evaluator, step, state)
            self._save(step, state)
        self.reporter.flush(step)
        self.checkpoints.wait()
        result = Result(status=status, step=step, metrics=self.reporter.latest, state=state)
        self._notify('end', step, state)
        if self.workdir is not None and status != 'paused':
            self.workdir.write_result(
                status=status,
                step=step,
                digest=self.checkpoints.digest(state),
                data_digest=self._data_digest.value,
                metrics=dict(result.metrics),
            )
        self.reporter.end(result.status, step)
        return result
