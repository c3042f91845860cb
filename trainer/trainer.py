# SPDX-License-Identifier: Apache-2.0
"""The training loop. Read `Trainer.fit` top to bottom and you know what a run does."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from trainer.config.errors import UserError
from trainer.experiment import Experiment
from trainer.input.batch import LoadedBatch
from trainer.input.prefetch import Prefetcher
from trainer.inspect import products
from trainer.inspect.monitors import Monitors
from trainer.observe.profile import Profile
from trainer.parallel import signals
from trainer.parallel.mesh import batch_shards
from trainer.parallel.signals import StopRequest
from trainer.run import banner, checks, evaluators, rescue, setup
from trainer.run.hook_calls import Hooks
from trainer.run.predictor import Predictor
from trainer.run.reporter import Reporter, check_row
from trainer.run.result import Result
from trainer.run.resume import Recovery
from trainer.step.programs import Program
from trainer.step.state import TrainState


class Trainer(Predictor):
    """Trains, evaluates and predicts with one experiment in one work directory.

    From Python or a notebook:

        experiment = load_and_build('configs/mnist.py', train_for='1 epoch')
        trainer = Trainer(experiment, '/tmp/mnist')
        trainer.fit(max_steps=100)
        trainer.evaluate()

    It never ends the process, and the only signal that it handles is Ctrl-C, while `fit` trains in
    the main thread: see `trainer.parallel.signals.handle_interrupts`. `trainer.main` handles all
    others.

    Attributes:
        run: its experiment, directory and checkpoints, which are attributes of their own too.
        experiment: what it trains; not the one passed in if a checkpoint has another batch size.
        workdir: the run's directory, or None if nothing is written.
        checkpoints: those of the work directory, or None without one.
        report: the run's rows and messages so far.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: str | None = None,
        *,
        mesh: Mesh | None = None,
        stop: StopRequest | None = None,
        allow_config_change: bool = False,
        overrides: Mapping[str, str] | None = None,
        verbose: bool = True,
    ):
        """Prepares a run; nothing is compiled before a method is called.

        Args:
            experiment: what `trainer.experiment.build` returned.
            workdir: where checkpoints, metrics and results go; None for a run that writes no files.
            mesh: used instead of that of `config.mesh`, which covers all devices.
            stop: when its `signal` is set, `fit` saves and returns after the current step or the
                current batch of an evaluation. If None, Ctrl-C has this effect.
            allow_config_change: resume even though the config identifies a different run.
            overrides: those of the command line, recorded in `run.json`.
            verbose: whether to print the banner and the rows; the files are the same.
        """
        super().__init__(experiment, workdir, mesh=mesh)
        run = self.run
        self.report = Reporter.from_experiment(run.experiment, verbose=verbose)
        self._events = run.events
        self._monitors: Monitors | None = None
        self._compiled = False
        self._profile = Profile(run.experiment.logging.profile, run.output_directory())
        self._hooks = Hooks(run.experiment, run.workdir, self.report)
        self._stop, self._given_stop = StopRequest(), stop
        self._fits = 0
        # The last completed step and its state: what is saved if an error ends the run.
        self._reached: tuple[int, TrainState] | None = None
        self._recovery = Recovery(
            run, self.report, allow_config_change=allow_config_change, overrides=overrides
        )

    def fit(self, *, state: TrainState | None = None, max_steps: int | None = None) -> Result:
        """Trains until `train_for`, resuming from the newest checkpoint of the work directory.

        Ctrl-C, or the stop button of a notebook, ends it after the current step with status
        'interrupted'; the next call resumes from there. If an evaluation, a hook or the data
        fails, the completed steps are saved first.

        Args:
            state: continue from this state, which may be of an experiment with another optimizer
                or learning rate; its arrays are donated to the first step. A work directory must
                be new, or its newest checkpoint of the same step.
            max_steps: return after this many steps of this call, without a final evaluation. The
                next call resumes from there, and donates the state in this call's result.

        Raises:
            UserError: if the work directory belongs to another or a longer run, and for mistakes
                found only now, such as a batch that does not divide over the mesh.
        """
        self._stop, self._fits = self._given_stop or StopRequest(), self._fits + 1
        # New hooks, because those that failed in an earlier call were removed.
        self._hooks = Hooks(self.experiment, self.workdir, self.report)
        try:
            with (
                rescue.handle_errors(self._recovery, self._hooks, self._rescue),
                contextlib.ExitStack() as until_end,
            ):
                return self._fit(state, max_steps, until_end)
        finally:
            self._reached = None

    def _fit(
        self, given: TrainState | None, max_steps: int | None, until_end: contextlib.ExitStack
    ) -> Result:
        state, step = self._begin(given)
        if self._given_stop is None:
            # Not while the state is restored and compiled: there is nothing to save yet, so Ctrl-C
            # may interrupt it as usual.
            until_end.enter_context(signals.handle_interrupts(self._stop))
        if self._evaluate_all(self._events.evals_due(step), step, state):
            # The last run saved this step but ended before these evaluations: add their results.
            self._recovery.amend(step)
        due = self._events.next_due(step)
        programs, monitors = self.set_up().programs, self.monitors()
        # The prefetcher must know the size of each call in advance: it stacks the batches of fused
        # steps.
        with self.batches(step, self._calls(step, max_steps)) as batches:
            monitors.follow(batches)
            for batch in batches:
                program = programs.step if batch.count == 1 else programs.fused
                # The call returns once the step is dispatched, long before it is computed. Between
                # events nothing here may wait for its result, or the devices would idle.
                self._profile.begin_step(step + batch.count)
                state = program(state, batch.arrays)
                step += batch.count
                self._recovery.count_batch(batch)
                # As soon as the step counts as done: if anything below fails, this is what is
                # saved.
                self._reached = step, state
                self.report.record_step(step)
                monitors.poll(state)
                if step == due:
                    state = self._run_events(step, state, batch)
                    due = self._events.next_due(step)
                # All processes must poll equally often: this decides at which poll they save and
                # stop together.
                if self._stop.save.poll(step):
                    self._save(step, state)
                if self._stop.poll() or self._recovery.stopped_early:
                    break
        self._print(self._profile.close(state))
        if self._recovery.stopped_early:
            # The evaluations of the end; those that are due at this step have run, and are not
            # repeated.
            self._evaluate_all(self._events.final, step, state)
        return self._end(step, state)

    def _begin(self, given: TrainState | None) -> tuple[TrainState, int]:
        """Restores or creates the state, opens the run's files and prints the banner."""
        report = self.report
        report.start()
        # Before anything is compiled, which may take minutes.
        self.check_workdir()
        with report.time.measure('compile'):
            # The compiler works in the background while the state is restored. What waits for it
            # comes after the banner, which is then on the screen meanwhile.
            compiling = self.compile()
            programs, mesh = self.set_up().programs, self.set_up().mesh
            state, step = self._recovery.start(programs, given)
        self._reached = step, state
        # Only now: a start that fails before this point leaves the directory unchanged.
        self._recovery.open(step)
        self._print(banner.summary(self.experiment, programs.abstract, mesh, self.workdir, step))
        self._notify('start', step, state)
        with report.time.measure('compile'):
            for program in compiling:
                program.executable()
        self.monitors().begin(step, state)
        report.begin(step)
        self._stop.starting = False  # From here on there is progress that a signal must save.
        return state, step

    def _run_events(self, step: int, state: TrainState, batch: LoadedBatch) -> TrainState:
        """Runs the events due after this step, in the order log, monitors, eval, hooks, save."""
        # First: a trace covers whole steps, and none of the events after them.
        self._print(self._profile.update(step, state))
        self.report.count_compilations(self.set_up().programs.step.late_secs)
        log_due = self._events.log.is_due(step)
        if log_due or step == self._events.total_steps:
            # Does not wait for the step: Reporter fetches the values once they are computed.
            health = None if self.experiment.ensemble is None else state.health
            self.report.log(step, state.metrics, stopped=None if health is None else health.is_bad)
            self._recovery.check_saves()
            # At the end of the run alone the metrics are not reset: a longer run that resumes from
            # here continues the same logging period.
            if log_due:
                state = dataclasses.replace(state, metrics=self.set_up().programs.empty_metrics())
                self._reached = step, state
            self._notify('log', step, state)
        # Before the evaluations and the save: a state that is not finite gets neither.
        self.monitors().run(batch, step, state)
        self._evaluate_all(self._events.evals_due(step), step, state)
        if due := self._events.hooks_due(step):
            # Their time is theirs alone, and they see all metrics up to this step.
            self.report.flush()
            jax.block_until_ready(state.step)
            self._notify('step', step, state, only=due)
        # After the evaluations, whose results go into the checkpoint: retention ranks it by them.
        if self._events.save.is_due(step):
            self._save(step, state)
        return state

    def _evaluate_all(self, names: Iterable[str], step: int, state: TrainState) -> bool:
        """Runs evaluations that have not run at this step; returns whether there were any."""
        due = [name for name in names if not self.report.has_eval(name, step)]
        for name in due:
            # Asked before each: once a stop is requested, the remaining evaluations are left to the
            # next start.
            if not self._stop.poll():
                self._evaluate(name, step, state)
        return bool(due)

    def _evaluate(self, name: str, step: int, state: TrainState) -> None:
        # Wait for the queued steps, so that their time is not counted as the evaluation's.
        self.report.flush()
        jax.block_until_ready(state.step)
        self.monitors().check(step, state)
        evaluator = self.set_up().evaluators[name]
        if not evaluators.run_for_row(
            evaluator, step, state, self.report, self._profile, should_stop=self._stop.poll
        ):
            # The next start runs it: the checkpoint of this step records which are missing.
            return
        try:
            self._notify('eval', step, state, evaluation=name)
        finally:
            # Also if a hook fails: the evaluation has its part in early stopping in any case.
            self._print(self._recovery.follow(name, self.report.eval_values(name)))
        try:
            checks.check_watched(self.experiment, name, self.report.eval_values(name))
        except UserError:
            self.report.forget_eval(name, step)
            raise

    def _save(self, step: int, state: TrainState) -> None:
        if self.checkpoints is None:
            return
        # Write the rows first: they show why the check may end the run.
        self.report.flush()
        self.monitors().check(step, state)
        if self._recovery.save(step, state):
            self._notify('save', step, state)

    def _end(self, step: int, state: TrainState) -> Result:
        """Saves the last step, writes the result and returns it."""
        # The last row first: it shows the loss that the check may complain about.
        self.report.flush()
        self.monitors().check(step, state)
        status = self._status(step)
        self._save(step, state)
        # After the save: the error of a hook costs no progress.
        self._hooks.raise_deferred(step)
        self._recovery.end(status, step, state)
        # Once `result.json` is written, so that a hook can read it.
        self._hooks.end(step, state, status)
        self.report.end(status, step)
        metrics, history = dict(self.report.latest), self.report.history.columns()
        return Result(status=status, step=step, metrics=metrics, history=history, state=state)

    def _rescue(self, error: BaseException) -> None:
        """Saves the state of the last completed step before an error ends the run."""
        if self._reached is not None:
            rescue.save_completed(
                self._recovery,
                *self._reached,
                error,
                self._stop,
                call=self._fits,
                is_finite=self.monitors().is_finite,
            )

    def _calls(self, step: int, max_steps: int | None) -> Iterator[int]:
        """Yields the number of steps of each call of a program; none if already asked to stop."""
        total, most = self._events.total_steps, self.experiment.training.steps_per_call
        last = total if max_steps is None else min(total, step + max_steps)
        stopped = self._stop.poll() or self._recovery.stopped_early
        # With no step left the loop is skipped, but the run still ends properly, with its
        # evaluations and its save.
        return self._events.calls(step, step if stopped else last, most)

    def _status(self, step: int) -> str:
        at_end, early = step == self._events.total_steps, self._recovery.stopped_early
        # A run whose last evaluations were cut short by a signal has not finished.
        evals = self._events.final if early else self._events.evals_due(step)
        if (at_end or early) and all(self.report.has_eval(n, step) for n in evals):
            return 'finished' if at_end else 'stopped_early'
        return self._stop.status or 'paused'

    def _notify(self, kind: str, step: int, state: TrainState, **more: Any) -> None:
        self._hooks.call(kind, step, state, self._stop, **more)

    def _print(self, message: str | None) -> None:
        if message is not None:
            self.report.progress.message(message)

    # What follows prepares the loop.

    def monitors(self) -> Monitors:
        """Returns the monitors of the run (captures and guard), created by the first call."""
        if self._monitors is None:
            self._monitors = Monitors(
                self.experiment,
                self.set_up().mesh,
                self.set_up().programs,
                self.report,
                checkpoints=self.checkpoints,
                directory=self.run.output_directory(),
            )
        return self._monitors

    def check_batch(self) -> None:
        """Checks that a training batch divides over the devices, before anything is traced.

        Raises:
            UserError: if it does not; the message suggests batch sizes.
        """
        checks.check_batch(self.experiment, batch_shards(self.mesh()))

    def check_workdir(self) -> None:
        """Checks that the checkpoints in the work directory belong to this run.

        Raises:
            UserError: if the config differs, unless `allow_config_change`; or if the checkpoint is
                past the end of this run.
        """
        self.check_agreement()
        # After the processes agree on the newest checkpoint: this may raise, and must do so in all
        # of them.
        self._recovery.check()

    def compile(self) -> list[Program]:
        """Starts compiling the training programs, and checks the evaluations meanwhile.

        Returns:
            The programs; their `executable()` waits for the compiler.

        Raises:
            UserError: for mistakes found only now, such as a batch that does not divide over the
                mesh or an evaluation of an empty split.
        """
        experiment, first = self.experiment, not self._compiled
        self.check_batch()
        programs, mesh = self.set_up().programs, self.set_up().mesh
        self._compiled = True
        if first:
            checks.warn_at_start(experiment, self._events, programs.abstract, mesh)
        # What follows runs while the compiler works in other threads.
        started = setup.start_compiling(experiment, programs)
        check_row(programs.abstract.metrics)
        if first:
            products.warn_of_other_dtypes(programs, experiment.model)
        setup.prepare_evaluators(experiment, self.set_up().evaluators, programs.abstract)
        self.monitors().prepare()
        return started

    def batches(self, start: int, calls: Iterable[int]) -> Prefetcher:
        """Returns the training batches after `start` steps, in blocks of the sizes in `calls`."""
        return setup.training_batches(
            self.experiment,
            self.run.batch_sizes,
            self.set_up().mesh,
            self.set_up().programs.fields,
            start,
            calls,
        )
