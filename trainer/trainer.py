# SPDX-License-Identifier: Apache-2.0
"""The training loop. Read `Trainer.fit` top to bottom and you know what a run does."""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from trainer import startup
from trainer.checkpoint.manager import Checkpoints
from trainer.config import diff
from trainer.config.errors import UserError
from trainer.evaluate.evaluator import Evaluator
from trainer.events import Event, Events
from trainer.experiment import Experiment
from trainer.observe.reporter import Reporter
from trainer.parallel.mesh import batch_sharding, batch_shards, make_mesh
from trainer.parallel.signals import StopRequest
from trainer.prefetch import Prefetcher
from trainer.step.program import Programs
from trainer.step.state import TrainState
from trainer.step.train_step import TrainStep
from trainer.workdir import Workdir, describe_run, versions


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

        experiment = load_and_build('configs/mnist.py', train_for='1 epoch')
        trainer = Trainer(experiment, '/tmp/mnist')
        trainer.fit(max_steps=100)
        trainer.evaluate()

    It installs no signal handlers and never ends the process; `trainer.main` does that.

    Attributes:
        experiment: what is trained.
        workdir: the run's directory, or None: then nothing is written.
        report: what the run has told so far.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: str | None = None,
        *,
        stop: StopRequest | None = None,
        allow_config_change: bool = False,
        overrides: Mapping[str, str] | None = None,
    ):
        """Prepares a run; nothing is compiled before a method is called.

        Args:
            experiment: from `trainer.experiment.build`.
            workdir: where checkpoints, metrics and results go; None for a run that leaves no trace.
            stop: when its `signal` is set, `fit` saves and returns after the current step.
            allow_config_change: go on with a run although the config makes it another one.
            overrides: the command line's, for `run.json`.
        """
        self.experiment = experiment
        self.workdir = None if workdir is None else Workdir(workdir)
        self.report = Reporter(experiment.total_steps, experiment.clock.batch_size)
        self._stop = stop or StopRequest()
        self._allow_config_change = allow_config_change
        self._overrides = dict(overrides or {})
        self._events = Events.of(experiment)
        # Without a work directory the next call of `fit` goes on from here.
        self._paused: tuple[TrainState, int] | None = None

    # ---- the run -------------------------------------------------------------------------------

    def fit(self, *, max_steps: int | None = None) -> Result:
        """Trains until `train_for`, going on from the newest checkpoint of the work directory.

        Args:
            max_steps: return after this many updates of this call, without a final evaluation; the
                next call goes on from there, and takes the state of this one's result with it.

        Raises:
            UserError: for what only shows now, such as a batch that does not divide over the mesh.
        """
        try:
            return self._fit(max_steps)
        except BaseException as error:
            # Whatever went wrong, a save that is on its way gets there; the process may end next.
            if self.checkpoints is not None:
                try:
                    self.checkpoints.close()
                except Exception as late:
                    error.add_note(f'A save in the background had failed too: {late!r}')
            raise

    def _fit(self, max_steps: int | None) -> Result:
        state, step = self._begin()
        total = self.experiment.total_steps
        last = total if max_steps is None else min(total, step + max_steps)
        due = self._events.next_due(step)
        with self._batches(step, last) as batches:
            for count, batch in batches:
                program = self.programs.step if count == 1 else self.programs.fused
                state = program(state, batch)
                step += count
                self.report.stepped(step)
                if step == due:
                    state = self._run_events(step, state, batches)
                    due = self._events.next_due(step)
                if self._stop.signal is not None:
                    break
            self._count_data(batches, step)
        return self._end(step, state)

    def _run_events(self, step: int, state: TrainState, batches: Prefetcher) -> TrainState:
        """Runs what is due after this step, in the order log, eval, save."""
        self._count_data(batches, step)
        if self._events.log.due(step):
            # Its row is fetched when the next step has been dispatched: see Reporter.
            self.report.log(step, state.metrics)
            if self.checkpoints is not None:
                self.checkpoints.check()
            state = dataclasses.replace(state, metrics=self.programs.empty_metrics())
            self._notify('log', step, state)
        for name, periodic in self._events.evals.items():
            if periodic.due(step):
                self._evaluate(name, step, state)
        if self._events.save.due(step):
            self._save(step, state)
        return state

    def _begin(self) -> tuple[TrainState, int]:
        """Restores or makes the state, opens the run's files, says what will run."""
        report = self.report
        self.check_workdir()
        if self.workdir is not None:
            changes = self.workdir.begin(
                self.experiment.config,
                self.experiment.schedule_steps,
                describe_run(self._overrides),
            )
            if changes and self.checkpoints is not None and self.checkpoints.latest() is not None:
                report.progress.message(f'The config has changed:\n{diff.format_diff(changes)}')
        with report.time.spent('compile'):
            started = self.programs.fused if self.experiment.steps_per_call > 1 else None
            compiling = self.programs.step
            state, step = self._restored_or_fresh()
        if self.workdir is not None:
            report.open(self.workdir.path, step, tensorboard=self.experiment.tensorboard)
        report.progress.message(startup.summary(self, step))
        self._notify('start', step, state)
        with report.time.spent('compile'):
            compiling.ready()
            if started is not None:
                started.ready()
        report.begin(step)
        return state, step

    def _end(self, step: int, state: TrainState) -> Result:
        """Final evaluation, final save and result; only a save if the run was cut short."""
        status = self._status(step)
        if status == 'finished':
            if not self._events.log.due(step):
                # The steps since the last row; a longer run goes on counting where they left off.
                self.report.log(step, state.metrics)
            for name, spec in self.experiment.evals.items():
                if spec.final and not self.report.has_eval(name, step):
                    self._evaluate(name, step, state)
        self._save(step, state)
        self.report.flush()
        if self.checkpoints is None:
            self._paused = (state, step)
        metrics = dict(self.report.latest)
        self._notify('end', step, state)
        if self.checkpoints is not None:
            with self.report.time.spent('save'):
                self.checkpoints.close()
            if self.workdir is not None and status != 'paused':
                digest = self.checkpoints.meta(step)['digest']
                self.workdir.write_result(status, step, digest, self._data_digest.value, metrics)
        self.report.end(status, step)
        return Result(status=status, step=step, metrics=metrics, state=state)

    def _status(self, step: int) -> str:
        if step >= self.experiment.total_steps:
            return 'finished'
        if self._stop.signal is None:
            return 'paused'
        return 'interrupted' if self._stop.signal == signal.SIGINT else 'preempted'

    def check_workdir(self) -> None:
        """Refuses a work directory whose checkpoints are of another run.

        Raises:
            UserError: naming what differs, unless `allow_config_change`.
        """
        has_run = self.checkpoints is not None and self.checkpoints.latest() is not None
        if self.workdir is not None and has_run and not self._allow_config_change:
            self.workdir.check_same_run(self.experiment.config, self.experiment.schedule_steps)

    # ---- other things to do with an experiment -------------------------------------------------

    def init_state(self) -> TrainState:
        """Returns a fresh state, every leaf born on the devices that hold it."""
        return self.programs.init()

    def restore(self, step: int | str = 'latest') -> TrainState:
        """Returns the state of a checkpoint of the work directory.

        Args:
            step: a number, 'latest' or 'best'.

        Raises:
            UserError: if there is no such checkpoint.
            CheckpointError: if its arrays are not those that were saved.
        """
        if self.checkpoints is None:
            raise UserError('restore: this trainer has no work directory')
        steps = self.checkpoints.steps()
        named = {'latest': self.checkpoints.latest, 'best': self.checkpoints.best}
        number = int(step) if str(step).isdigit() else None
        found = named[str(step)]() if step in named else number
        if found is None or found not in steps:
            have = ', '.join(map(str, steps)) or 'none'
            raise UserError(
                f'no checkpoint {step!r} in {self.checkpoints.directory}; there: {have}'
            )
        return self.checkpoints.restore(found, self.programs.abstract)

    def evaluate(self, state: TrainState | None = None) -> dict[str, dict[str, float]]:
        """Returns the metrics of each evaluation of the config.

        Args:
            state: what to evaluate; by default the newest checkpoint.
        """
        state = self.restore() if state is None else state
        return {name: evaluator.run(state) for name, evaluator in self.evaluators.items()}

    def predict(
        self, evaluation: str, state: TrainState | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the task's predictions for each batch of an evaluation's split, padding removed.

        Args:
            evaluation: its name in the config.
            state: whose predictions; by default the newest checkpoint's.

        Raises:
            UserError: if the task has no method `predict`.
        """
        state = self.restore() if state is None else state
        return self.evaluators[evaluation].predict(state)

    # ---- parts, made when they are first used --------------------------------------------------

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The device mesh."""
        return make_mesh(self.experiment.mesh)

    @functools.cached_property
    def programs(self) -> Programs:
        """The compiled programs of training; compiling starts with the first access."""
        experiment, shards = self.experiment, batch_shards(self.mesh)
        startup.check_batch(experiment, shards)
        train_step = TrainStep(
            model=experiment.model,
            task=experiment.task,
            optimizer=experiment.optimizer,
            seed=experiment.seed,
            function=experiment.step,
            accumulate=experiment.accumulate,
            ema_decay=experiment.ema_decay,
            shards=shards,
            log=self._events.log,
        )
        spec = startup.abstract_batch(experiment.data.spec)
        return Programs(train_step, spec, self.mesh, experiment.steps_per_call)

    @functools.cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        """One evaluator for each entry of `config.evals`; each compiles at its first batch."""
        return {
            name: Evaluator.of(name, spec, self.experiment, self.mesh)
            for name, spec in self.experiment.evals.items()
        }

    @functools.cached_property
    def checkpoints(self) -> Checkpoints | None:
        """The work directory's checkpoints, or None without one."""
        if self.workdir is None:
            return None
        return Checkpoints(self.workdir.checkpoints, self.experiment.retention)

    @functools.cached_property
    def _data_digest(self) -> Any:
        return self.experiment.data.new_digest()

    # ---- helpers -------------------------------------------------------------------------------

    def _restored_or_fresh(self) -> tuple[TrainState, int]:
        if self._paused is not None:
            # Its buffers are donated to the next step: whatever happens, it is used once.
            paused, self._paused = self._paused, None
            return paused
        latest = None if self.checkpoints is None else self.checkpoints.latest()
        if self.checkpoints is None or latest is None:
            return self.programs.init(), 0
        state = self.checkpoints.restore(latest, self.programs.abstract)
        meta = self.checkpoints.meta(latest)
        self._data_digest.restore(meta['data_digest'])
        self.report.latest.update(meta['metrics'])
        return state, latest

    def _batches(self, step: int, last: int) -> Prefetcher:
        experiment = self.experiment
        return Prefetcher(
            experiment.data.block,
            self._events.calls(step, last, experiment.steps_per_call),
            batch_sharding(self.mesh),
            start=step,
            depth=experiment.prefetch,
        )

    def _evaluate(self, name: str, step: int, state: TrainState) -> None:
        # What is still queued is the steps' time, not the evaluation's.
        self.report.flush()
        jax.block_until_ready(state.step)
        with self.report.time.spent('eval'):
            metrics = self.evaluators[name].run(state)
            self.report.evaluated(name, step, metrics)
        self._notify('eval', step, state)

    def _save(self, step: int, state: TrainState) -> None:
        if self.checkpoints is None or self.checkpoints.has(step):
            return
        with self.report.time.spent('save'):
            # All rows up to this step are on disk before its save starts, so that a resumed run
            # neither misses a row nor writes it twice.
            self.report.sync()
            meta = {
                'step': step,
                'evaluated': [n for n in self.experiment.evals if self.report.has_eval(n, step)],
                'metrics': dict(self.report.latest),
                'data_digest': self._data_digest.value,
                'versions': versions(),
                'config': diff.to_jsonable(self.experiment.config),
            }
            self.checkpoints.save(step, state, meta)
        self._notify('save', step, state)

    def _count_data(self, batches: Prefetcher, step: int) -> None:
        self.report.time.set('data wait', batches.wait_secs)
        for start, ids in batches.take_ids(step):
            self._data_digest.add(start, ids)

    def _notify(self, kind: str, step: int, state: TrainState) -> None:
        if not self.experiment.hooks:
            return
        event = Event(
            kind=kind,
            step=step,
            state=state,
            metrics=dict(self.report.latest),
            workdir=None if self.workdir is None else str(self.workdir.path),
        )
        for hook in self.experiment.hooks.values():
            hook(event)
