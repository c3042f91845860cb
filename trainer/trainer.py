# SPDX-License-Identifier: Apache-2.0
"""The training loop. Read `Trainer.fit` top to bottom and you know what a run does."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from trainer.evaluate.evaluator import Stopped
from trainer.experiment import Experiment
from trainer.input.batch import LoadedBatch
from trainer.inspect.monitors import Probes
from trainer.observe.profile import Profile
from trainer.observe.progress import Nowhere
from trainer.observe.reporter import Reporter
from trainer.parallel import last_words, processes, signals
from trainer.parallel.signals import StopRequest
from trainer.run import startup
from trainer.run.hook_calls import Hooks
from trainer.run.resume import Recovery
from trainer.run.setup import Parts
from trainer.step import donated
from trainer.step.state import TrainState

# How long a process that fails waits for the others to fail too.
_MEETING_SECS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How a call of `fit` ended.

    Attributes:
        status: 'finished', 'stopped_early' (`config.early_stopping`), 'preempted' (SIGTERM),
            'interrupted' (Ctrl-C, or the stop button of a notebook) or 'paused' (`max_steps`).
        step: number of completed updates.
        metrics: the newest value of each metric, by its flat name ('eval/test/accuracy').
        state: the state at `step`; gone once another call of `fit` has donated it to a step.
    """

    status: str
    step: int
    metrics: Mapping[str, float]
    state: TrainState = dataclasses.field(repr=False, compare=False)  # Thousands of numbers.

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == 'state':
            donated.check(value, 'result.state')
        return value


class Trainer(Parts):
    """Trains, evaluates and predicts with one experiment in one work directory.

    From Python or a notebook::

        experiment = load_and_build('configs/mnist.py', train_for='1 epoch')
        trainer = Trainer(experiment, '/tmp/mnist')
        trainer.fit(max_steps=100)
        trainer.evaluate()

    It never ends the process, and the only signal that it handles is Ctrl-C, while `fit` trains in
    the main thread: see `trainer.parallel.signals.interruptible`. `trainer.main` handles all
    others. Its building blocks, and everything but training, are in `trainer.run.setup`.

    Attributes:
        experiment: what is trained.
        workdir: the run's directory, or None: then nothing is written.
        report: the run's rows and messages so far.
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
            stop: when its `signal` is set, `fit` saves and returns after the current step or the
                current batch of an evaluation. Without one, Ctrl-C does so.
            allow_config_change: resume even though the config makes it a different run.
            overrides: the command line's, for `run.json`.
        """
        super().__init__(experiment, workdir)
        screen = None if processes.is_primary() else Nowhere()
        # Not the given one: a run whose batch size has changed has another length.
        total, batch_size = self.experiment.total_steps, self.experiment.clock.batch_size
        ensemble = self.experiment.ensemble
        members = [ensemble.describe(i) for i in range(ensemble.size)] if ensemble else []
        self.report = Reporter(total, batch_size, screen, members)
        self._probes = Probes(self, self.report)
        self._hooks = Hooks(self, self.report)
        self._stop, self._given_stop = StopRequest(), stop
        self._fits = 0
        # What `_rescue` saves: the last completed step.
        self._reached: tuple[int, TrainState] | None = None
        self._recovery = Recovery(
            self, self.report, allow_config_change=allow_config_change, overrides=overrides
        )

    def check_workdir(self) -> None:
        """Refuses a work directory whose checkpoints are of another run, or of a longer one.

        Raises:
            UserError: naming what differs, unless `allow_config_change`; or the step that is
                already behind the end of this run.
        """
        self._recovery.check()

    def fit(self, *, max_steps: int | None = None) -> Result:
        """Trains until `train_for`, resuming from the newest checkpoint of the work directory.

        Ctrl-C, or the stop button of a notebook, ends it after the current step with status
        'interrupted'; the next call resumes from there. If an evaluation, a hook or the data
        fails, the completed steps are saved first.

        Args:
            max_steps: return after this many updates of this call, without a final evaluation; the
                next call resumes from there, and donates the state in this call's result.

        Raises:
            UserError: for a work directory of another or a longer run, and for mistakes that show
                only now, such as a batch that does not divide over the mesh.
        """
        self._stop = self._given_stop or StopRequest()
        self._hooks, self._fits = Hooks(self, self.report), self._fits + 1
        try:
            several = jax.process_count() > 1
            with (
                last_words.registered(self._recovery.record_exit, stay=several),
                contextlib.ExitStack() as until_end,
            ):
                return self._fit(max_steps, until_end)
        except BaseException as error:
            self._hooks.note_on(error)
            donated.explain(error)
            try:
                self._rescue(error)
            finally:
                try:
                    self._recovery.abandon(error)
                finally:
                    self._hooks.end_failed(error)
            raise
        finally:
            self._reached = None

    def _fit(self, max_steps: int | None, until_end: contextlib.ExitStack) -> Result:
        state, step = self._begin()
        if self._given_stop is None:
            until_end.enter_context(signals.interruptible(self._stop))
        if self._evaluate_due(step, state):
            # The last run ended before these evaluations, and saved this step without them.
            self._recovery.amend(step)
        due = self._events.next_due(step)
        with self.batches(step, self._calls(step, max_steps)) as batches:
            self._probes.follow(batches)
            for batch in batches:
                program = self.programs.step if batch.count == 1 else self.programs.fused
                self._profile.begin_step(step + batch.count)
                state = program(state, batch.arrays)
                step += batch.count
                self._recovery.count(batch)
                self._reached = step, state
                self.report.stepped(step)
                self._probes.poll(state)
                if step == due:
                    state = self._run_events(step, state, batch)
                    due = self._events.next_due(step)
                if self._stopping() or self._stopped_early:
                    break
        self._tell(self._profile.close(state))
        if self._stopped_early:
            self._evaluate_all(self._events.final, step, state)
        return self._end(step, state)

    def _begin(self) -> tuple[TrainState, int]:
        """Restores or makes the state, opens the run's files, says what will run."""
        report = self.report
        report.start()
        self.check_workdir()
        with report.time.spent('compile'):
            programs = self.compile()
            state, step = self._recovery.start()
        self._reached = step, state
        # Not before: a start that has failed so far leaves the directory as it was.
        self._recovery.open(step)
        report.progress.message(startup.summary(self, step))
        self._notify('start', step, state)
        with report.time.spent('compile'):
            for program in programs:
                program.ready()
        self._probes.begin(step, state)
        report.begin(step)
        self._stop.starting = False  # From here on a signal has something to save.
        return state, step

    def _run_events(self, step: int, state: TrainState, batch: LoadedBatch) -> TrainState:
        """Runs what is due after this step, in the order log, probes, eval, save."""
        self._tell(self._profile.stepped(step, state))
        log_due = self._events.log.due(step)
        if log_due or step == self.experiment.total_steps:
            # Its row is fetched when it is there: see Reporter.
            health = None if self.experiment.ensemble is None else state.health
            stopped = None if health is None else health.is_bad
            self.report.log(step, state.metrics, stopped=stopped)
            self._recovery.check_saves()
            if log_due:  # Or else a longer run goes on counting where this one left off.
                state = dataclasses.replace(state, metrics=self.programs.empty_metrics())
                self._reached = step, state
            self._notify('log', step, state)
        self._probes.run(batch, step, state)
        self._evaluate_due(step, state)
        if self._events.save.due(step):
            self._save(step, state)
        return state

    def _end(self, step: int, state: TrainState) -> Result:
        """Final save and result."""
        self.report.flush()
        self._probes.check(step, state)
        status = self._status(step)
        self._save(step, state)
        self._hooks.raise_late(step)
        self._recovery.end(status, step, state)
        self._hooks.end(step, state, status)
        self.report.end(status, step)
        return Result(status=status, step=step, metrics=dict(self.report.latest), state=state)

    def _rescue(self, error: BaseException) -> None:
        """Keeps the state of the last completed step, before an error ends the run."""
        if self._reached is None or not self._all_failed(self._reached[0]):
            return
        if isinstance(error, KeyboardInterrupt) and self._stop.signal == signal.SIGINT:
            self._recovery.remember(*self._reached)  # The second Ctrl-C: at once.
        else:
            self._recovery.rescue(*self._reached, error, is_sound=self._probes.is_sound)

    def _all_failed(self, step: int) -> bool:
        """Whether all processes end with an error at this step: one alone cannot save."""
        if jax.process_count() > 1:
            place = f'failed at step {step} in call {self._fits}'
            self._stop.all_failed = processes.all_arrive(place, _MEETING_SECS)
            return self._stop.all_failed
        return True

    def _calls(self, step: int, max_steps: int | None) -> Iterator[int]:
        """Yields how many updates each call of a program makes; none if a stop came early."""
        total, most = self.experiment.total_steps, self.experiment.steps_per_call
        last = total if max_steps is None else min(total, step + max_steps)
        stopped = self._stopping() or self._stopped_early
        return self._events.calls(step, step if stopped else last, most)

    def _status(self, step: int) -> str:
        at_end = step == self.experiment.total_steps
        owed = self._events.final if self._stopped_early else self._events.evals_due(step)
        if (at_end or self._stopped_early) and all(self.report.has_eval(n, step) for n in owed):
            return 'finished' if at_end else 'stopped_early'
        if self._stop.signal is None:
            return 'paused'
        return 'interrupted' if self._stop.signal == signal.SIGINT else 'preempted'

    @property
    def _stopped_early(self) -> bool:
        early = self._recovery.early_stopping
        return early is not None and early.stopped

    def _stopping(self) -> bool:
        return self._stop.poll()

    def _evaluate_due(self, step: int, state: TrainState) -> bool:
        """Runs what is due and has not run at this step; returns whether there was anything."""
        return self._evaluate_all(self._events.evals_due(step), step, state)

    def _evaluate_all(self, names: Iterable[str], step: int, state: TrainState) -> bool:
        due = [name for name in names if not self.report.has_eval(name, step)]
        for name in due:
            if not self._stopping():
                self._evaluate(name, step, state)
        return bool(due)

    def _evaluate(self, name: str, step: int, state: TrainState) -> None:
        # What is still queued is the steps' time, not the evaluation's.
        self.report.flush()
        jax.block_until_ready(state.step)
        self._probes.check(step, state)
        evaluator = self.evaluators[name]
        compiled = evaluator.compile_secs
        with self.report.time.spent('eval'):
            try:
                with self._profile.evaluation(name):
                    metrics = evaluator.run(state, should_stop=self._stopping)
            except Stopped:
                # The next start runs it: the checkpoint of this step says what it lacks.
                return
            self.report.evaluated(name, step, metrics)
        self.report.time.move('eval', 'compile', evaluator.compile_secs - compiled)
        if (early := self._recovery.early_stopping) is not None:
            before = early.stopped
            early.update(name, metrics)
            if early.stopped and not before:
                self._tell(early.reason())
        self._notify('eval', step, state, evaluation=name)

    @functools.cached_property
    def _profile(self) -> Profile:
        writes = self.workdir is not None and processes.is_primary()
        directory = self.workdir.path / 'profile' if self.workdir and writes else None
        return Profile(self.experiment.profile, directory)

    def _tell(self, message: str | None) -> None:
        if message is not None:
            self.report.progress.message(message)

    def _save(self, step: int, state: TrainState) -> None:
        if self.checkpoints is None:
            return
        # Rows first: they show why the check may end the run.
        self.report.flush()
        self._probes.check(step, state)
        if self._recovery.save(step, state):
            self._notify('save', step, state)

    def _notify(self, kind: str, step: int, state: TrainState, **more: Any) -> None:
        self._hooks.call(kind, step, state, self._stop, **more)
