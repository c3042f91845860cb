# SPDX-License-Identifier: Apache-2.0
"""Starting, saving and resuming a run, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from trainer.checkpoint import checked
from trainer.checkpoint.errors import CheckpointError, DamageError, SaveError
from trainer.checkpoint.manager import Checkpoints
from trainer.checkpoint.storable import check_storable
from trainer.config import diff
from trainer.config.errors import UserError
from trainer.input.batch import LoadedBatch
from trainer.input.fingerprint import data_changes, fingerprint
from trainer.input.position import DataPosition
from trainer.parallel import processes
from trainer.run import failure
from trainer.run.batch_sizes import BatchSizes, describe_position_in_new_data, describe_resize
from trainer.run.early_stopping import Patience
from trainer.run.failure import NonFiniteError
from trainer.run.given_state import adopt
from trainer.run.provenance import CodeInspector
from trainer.run.reporter import Reporter
from trainer.run.restore import init_state, restore, with_health, with_hyperparams
from trainer.run.setup import Run
from trainer.run.workdir import describe_run, utc_now, versions
from trainer.step import donated, health
from trainer.step.programs import Programs
from trainer.step.state import TrainState


class Recovery:
    """Restores the state to start from, and saves the state to resume from.

    The train state is kept in a checkpoint, or in memory between two calls without a work
    directory. With it goes what the host has counted: the position in the data and its digest, the
    newest metrics, the evaluations that have run at the saved step.

    Attributes:
        early_stopping: the counter of `config.early_stopping`, or None.
    """

    def __init__(
        self,
        run: Run,
        report: Reporter,
        *,
        allow_config_change: bool = False,
        overrides: Mapping[str, str] | None = None,
    ):
        """Reads and writes nothing yet.

        Args:
            run: has the checkpoints and the work directory.
            report: the run's metrics.
            allow_config_change: resume even though the config has changed.
            overrides: those of the command line, for `run.json`.
        """
        self._run = run
        self._report = report
        self._allow_config_change = allow_config_change
        self._overrides = dict(overrides or {})
        self._consumed = DataPosition(run.experiment.data)
        rule = run.experiment.training.early_stopping
        self.early_stopping = None if rule is None else Patience(rule)
        # Identifies the training data; None for a loader that has no first example.
        self._fingerprint: dict[str, Any] | None = None
        # Without a work directory, the next call resumes from here.
        self._paused: tuple[TrainState, int] | None = None
        # True from `open` to `end`: only a failure in between belongs in the run's files.
        self._running = False
        self._failed = False
        self._called = utc_now()
        self._code: CodeInspector | None = None

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping ends the run."""
        return self.early_stopping is not None and self.early_stopping.stopped

    def check(self) -> None:
        """Checks that the run can resume from the checkpoints in its work directory.

        Raises:
            UserError: if they are from another config (unless that is allowed), from a step after
                the end of this run, or missing although the run had saved some.
        """
        workdir, experiment = self._run.workdir, self._run.experiment
        self._called = utc_now()
        checkpoints = self._run.checkpoints
        if workdir is None or checkpoints is None or checkpoints.latest() is None:
            if workdir is not None:
                workdir.check_not_lost()
            self._check_batch_sizes()
            return
        # Before the lengths are compared: the steps of another run mean nothing here.
        if not self._allow_config_change:
            workdir.check_same_run(experiment.origin.config, experiment.origin.schedule_steps)
        self._check_batch_sizes()
        # A checkpoint that somebody renamed would be reported as a longer run.
        newest = checkpoints.newest_sound() or 0
        if newest > experiment.training.total_steps:
            raise UserError(
                f'{workdir.path} is at step {newest:,}, but config.train_for is only '
                f'{experiment.training.total_steps:,} steps. Use another --workdir or a longer '
                '--config.train_for.'
            )

    def start(self, programs: Programs, given: TrainState | None = None) -> tuple[TrainState, int]:
        """Returns the state that the run starts from (restored, fresh or given), and its step.

        Args:
            programs: the training programs.
            given: a state of the caller to continue from, or None.

        Raises:
            UserError: if the given state does not fit the experiment or the work directory.
        """
        experiment = self._run.experiment
        if self._run.workdir is not None and processes.is_main_process():
            # As early as possible: git works in the background, and the code may be edited as soon
            # as the run has started.
            self._code = CodeInspector(self._run.experiment.origin.path)
        if given is not None:
            return self._start_from(programs, given)
        # After an earlier call of `fit` without a work directory. Only the prefetcher has moved
        # since: it may have read batches that no step consumed.
        if self._paused is not None:
            self._consumed.resume(self._paused[1])
            return self._paused
        self._fingerprint_data()
        latest, checkpoints = self._latest_step(), self._run.checkpoints
        if checkpoints is None or latest is None:
            if checkpoints is not None:
                check_storable(programs.abstract.durable)
            self._report.restore(0, {}, ())
            # An earlier call may have failed after counting some batches.
            self._consumed.restart()
            self._restore_early_stopping({})
            return with_health(experiment, programs, init_state(experiment, programs)), 0
        if self._run.workdir is not None and processes.is_main_process():
            # Another run in this directory could delete the checkpoint while it is read.
            self._run.workdir.claim()
        return self._restore_newest(checkpoints, programs)

    def _restore_newest(
        self, checkpoints: Checkpoints, programs: Programs
    ) -> tuple[TrainState, int]:
        """Restores the newest checkpoint that is not damaged; moves newer ones aside."""
        damaged: dict[int, DamageError] = {}
        for step in reversed(checkpoints.steps()):
            try:
                state = self._restore(checkpoints, programs, step)
            except DamageError as error:
                damaged[step] = error
                continue
            # Only now: without a sound one nothing is renamed.
            for newer, reason in damaged.items():
                aside = checkpoints.set_aside(newer)
                self._report.progress.message(f'Warning: {reason}. Moved to {aside.name}.')
            if damaged:
                self._report.count_fallback(max(damaged) - step)
            return state, step
        reasons = ''.join(f'\n  {reason}' for reason in damaged.values())
        raise CheckpointError(
            f'no checkpoint of this run can be restored:{reasons}\n'
            'Restore one of them from a backup, or start again with another --workdir.'
        )

    def _restore(self, checkpoints: Checkpoints, programs: Programs, step: int) -> TrainState:
        """Restores a step: state, position in the data, early stopping and newest metrics.

        Raises:
            DamageError: if the checkpoint is damaged, or of another step.
        """
        experiment = self._run.experiment
        # Metadata first: it may be wrong, and the arrays can take minutes to read.
        meta = checkpoints.meta(step, checked.RUN_KEYS)
        checkpoints.check_name(step, meta)
        state = restore(experiment, checkpoints, programs, step)
        if self._allow_config_change:
            # Hyperparameters of an ensemble are part of the optimizer state, so the checkpoint has
            # the old ones.
            state = with_hyperparams(experiment, state)
        if not self._consumed.restore(step, meta, may_restart=self._allow_config_change):
            self._report.progress.message(
                'Restarting the data from the beginning, because the config changed.'
            )
        self._report_data_changes(step, meta)
        self._report_version_changes(meta)
        # After `with_hyperparams`: what is examined is the state that training resumes from.
        state = with_health(experiment, programs, state, meta.get('health'))
        self._restore_early_stopping(meta)
        self._report.restore(step, meta['metrics'], meta['evaluated'])
        return state

    def _start_from(self, programs: Programs, given: TrainState) -> tuple[TrainState, int]:
        message, latest = self._report.progress.message, self._latest_step()
        state, step = adopt(self._run.experiment, programs, given, message)
        if latest not in (None, step):
            raise UserError(
                f'fit(state): the state is at step {step:,}, but the newest checkpoint of the work '
                f'directory is of step {latest:,}. Use another work directory, or none'
            )
        self._fingerprint_data()
        if not self._move_data_to(step, latest) and step and self._run.experiment.data.is_stream:
            message('fit(state): the data is a stream, and starts from its beginning.')
        self._restore_early_stopping({})
        # The evaluations of this step are of another run, unless this Trainer has made them.
        names = [n for n in self._run.experiment.evals if self._report.has_eval(n, step)]
        self._report.restore(step, self._report.latest, names)
        return state, step

    def _move_data_to(self, step: int, latest: int | None) -> bool:
        """Moves the data to a step; returns whether it continues there, and does not restart.

        Args:
            step: that of a given state.
            latest: that of the newest checkpoint of the work directory, or None.
        """
        if self._paused is not None and self._paused[1] == step:
            self._consumed.resume(step)
            return True
        checkpoints = self._run.checkpoints
        if checkpoints is not None and latest == step:
            meta = checkpoints.meta(step, checked.RUN_KEYS)
            return self._consumed.restore(step, meta, may_restart=True)
        self._consumed.restart(step)
        return False

    def open(self, step: int) -> None:
        """Opens the run's files, and writes the config and `run.json`.

        Args:
            step: where the run starts or resumes.
        """
        # The next step donates the buffers of this state, so it can be used only once.
        self._paused = None
        workdir, experiment = self._run.workdir, self._run.experiment
        if workdir is None or not processes.is_main_process():
            return
        workdir.claim()
        # The lock comes first: what follows overwrites files that another run may be using.
        run = {'from_step': step, 'start': self._called, **describe_run(self._overrides)}
        changes = workdir.begin(experiment.origin.config, experiment.origin.schedule_steps, run)
        # Set once `run.json` is that of this start: a failure before this leaves the files of an
        # earlier run alone.
        self._running, self._failed = True, False
        workdir.forget_failure()
        # After `begin`, which creates the `run.json` that the code is added to.
        if self._code is not None:
            self._code.deliver_to(workdir.keep_code)
        # A state that was given to `fit` may be past step 0 without a checkpoint.
        if step > 0 and self._latest_step() is not None:
            workdir.mark_saved()
        else:
            workdir.unmark_saved()
        if changes and step > 0:
            self._report.progress.message(f'The config has changed:\n{diff.format_diff(changes)}')
        before = self._run.batch_sizes.previous_size(step)
        if before is not None:
            self._report.progress.message(
                describe_resize(experiment, self._run.batch_sizes, step, before)
            )
        # Last: it removes the rows after `step`, which cannot be undone.
        self._report.open(workdir.path, step, tensorboard=experiment.logging.tensorboard)

    def count_batch(self, batch: LoadedBatch) -> None:
        """Counts a batch that a step has consumed."""
        self._report.time.add('data wait', batch.wait_secs)
        self._consumed.add(batch)

    def check_saves(self) -> None:
        """Raises the error of a failed background save; does not wait for one in progress."""
        if self._run.checkpoints is not None:
            self._run.checkpoints.check()

    def save(self, step: int, state: TrainState) -> bool:
        """Starts to save a step, unless it is saved already; returns whether it did."""
        checkpoints = self._run.checkpoints
        if checkpoints is None or checkpoints.has(step):
            return False
        with self._report.time.measure('save'):
            # All rows up to this step are on disk before its save starts, so that a resumed run
            # neither misses a row nor writes it twice.
            self._report.sync()
            # Collective, and before the save: in a directory of another run it could overwrite its
            # checkpoints.
            self._check_workdir(step)
            meta = {
                'step': step,
                **self._measurements(step),
                # Collective, like the save itself: all processes must come here.
                **self._consumed.meta(),
                **health.to_metadata(state.health),
                'batch_sizes': self._run.batch_sizes.parts,
                'examples': self._run.batch_sizes.examples(step),
                'data': self._fingerprint,
                'versions': versions(),
                'config': diff.to_jsonable(self._run.experiment.origin.config),
            }
            checkpoints.save(step, state, meta)
        return True

    def amend(self, step: int) -> None:
        """Adds the results of evaluations that ran after a step was saved to its checkpoint."""
        checkpoints = self._run.checkpoints
        # A state that was given to `fit` may have no checkpoint yet.
        if checkpoints is not None and checkpoints.has(step):
            # As for a save: no checkpoint may say that an evaluation ran whose row is lost.
            self._report.sync()
            checkpoints.amend(step, self._measurements(step))

    def end(self, status: str, step: int, state: TrainState) -> None:
        """Waits for the saves, and writes `result.json` unless the run is only paused."""
        checkpoints, workdir = self._run.checkpoints, self._run.workdir
        if checkpoints is None or workdir is None:
            self._paused = (state, step)
            return
        with self._report.time.measure('save'):
            # The digest is part of the committed metadata, and `finished` must not be written
            # before the last checkpoint exists.
            checkpoints.close()
        self._check_workdir(step)
        # A paused run has no result yet: `result.json` would make the next start report that
        # there is nothing left to do.
        if status != 'paused':
            digest, metrics = checkpoints.meta(step)['digest'], dict(self._report.latest)
            data_digest = self._consumed.digest()
            if processes.is_main_process():
                workdir.write_result(status, step, digest, data_digest, metrics)
        self._running = self._failed = False
        workdir.end_run(status, step)
        workdir.release()

    def rescue(
        self,
        step: int,
        state: TrainState,
        error: BaseException,
        *,
        is_finite: Callable[[TrainState], bool],
    ) -> None:
        """Saves the state when an error ends the run; without a work directory, in memory.

        Evaluations that were due at this step and have not run will run after the next start. All
        processes must call it.

        Args:
            step: number of completed updates.
            state: train state after this step.
            error: what ends the run; it gets a note if the save fails as well.
            is_finite: returns whether a state is finite.
        """
        if not self._can_save(step, state, error, is_finite):
            return
        checkpoints = self._run.checkpoints
        if checkpoints is None:
            with contextlib.suppress(Exception):
                self._report.flush()
            self._paused = (state, step)
            return
        try:
            if self.save(step, state):
                checkpoints.close()
                self._report.progress.message(f'Saved step {step:,} before exiting.')
        except Exception as save_error:
            error.add_note(f'The state of step {step:,} could not be saved either: {save_error}')

    def remember(self, step: int, state: TrainState) -> None:
        """Keeps the state in memory for the next call, if there is no work directory."""
        if self._run.checkpoints is None and not donated.is_donated(state):
            self._paused = (state, step)

    def _can_save(
        self,
        step: int,
        state: TrainState,
        error: BaseException,
        is_finite: Callable[[TrainState], bool],
    ) -> bool:
        """Whether a run that an error ends may save its state for the next start.

        It may not if, in any process, the guard has stopped the run, a failed step has donated the
        buffers of the state, or a save has just failed.
        """
        # Summed over the processes, because a save needs all of them: one that cannot take part
        # would leave the others waiting.
        failed = isinstance(error, (CheckpointError, NonFiniteError))
        if processes.sum_over_processes(step == 0 or failed or donated.is_donated(state)):
            return False
        try:
            # The step may have failed on the device, which shows only now.
            jax.block_until_ready(state)
            return is_finite(state)
        except Exception:
            return False

    def abandon(self, error: BaseException) -> None:
        """Closes all files when the run fails, and writes `result.json`.

        A save in progress is completed first.
        """
        if self._run.checkpoints is not None:
            try:
                self._run.checkpoints.close()
            except Exception as save_error:
                error.add_note(f'A background save failed too: {save_error!r}')
        with contextlib.suppress(Exception):  # The pending row may be of a step that failed.
            self._report.flush_ready()
        # Further errors, of the disk or a library, must not hide the first one.
        with contextlib.suppress(Exception):
            self._report.close()
        try:
            with contextlib.suppress(Exception):
                self._record(failure.status(error), failure.describe(error, self._report.step))
        finally:
            self._running = False
            if self._run.workdir is not None:
                self._run.workdir.release()

    def record_exit(self, status: str, message: str) -> None:
        """Records how the run ends, just before the process exits.

        Args:
            status: how the run ended, as in `result.json`.
            message: why it ended.
        """
        step = self._report.step
        self._record(status, {'type': None, 'message': message, 'where': None, 'step': step})

    def _record(self, status: str, error: Mapping[str, Any]) -> None:
        """Records the end of a run that started in this process, or failed to start."""
        workdir = self._run.workdir
        if workdir is None or not processes.is_main_process():
            return
        if not workdir.is_this_run():  # It was deleted, or belongs to another run now.
            return
        if not self._running:
            # A run that failed to start must not change the files of an earlier one.
            if not (self._failed or workdir.is_fresh()):
                return
            workdir.claim()
        step, metrics = int(error['step']), dict(self._report.latest)
        self._failed = True
        workdir.end_run(status, step)
        workdir.write_result(status, step, *self._saved_digests(step), metrics, error)

    def _saved_digests(self, step: int) -> tuple[str | None, str | None]:
        """Returns the digests of state and data at a step, or None for both if it is not saved."""
        checkpoints = self._run.checkpoints
        with contextlib.suppress(CheckpointError, OSError):
            if checkpoints is not None and step in checkpoints.steps():
                meta = checkpoints.meta(step)
                return meta.get('digest'), meta.get('data_digest')
        return None, None

    def _check_workdir(self, step: int) -> None:
        """Checks that the work directory has not been deleted; all processes must call it."""
        workdir = self._run.workdir
        if workdir is None or not processes.sum_over_processes(not workdir.is_this_run()):
            return
        raise SaveError(
            f'{workdir.path} was deleted during this run, or another run has overwritten its '
            f'run.json. This run ends at step {step:,}; deleted files are lost. Start it again '
            'with a --workdir that no other run or program uses.',
            is_temporary=False,
        )

    def _fingerprint_data(self) -> None:
        """Computes the fingerprint of the training data, which each checkpoint stores.

        Done before training reads the data: a save must not read a source that is in use.
        """
        data = self._run.experiment.data
        if self._run.checkpoints is not None and data.with_first is not None:
            self._fingerprint = fingerprint(data)

    def _report_data_changes(self, step: int, meta: Mapping[str, Any]) -> None:
        """Warns if the data has changed since a checkpoint was saved."""
        before, now = meta.get('data'), self._fingerprint
        if not before or not now or not (changes := data_changes(before, now)):
            return
        text = f'Warning: the training data has changed: {"; ".join(changes)}.'
        if before['examples'] != now['examples']:
            text += ' ' + describe_position_in_new_data(
                self._run.experiment, self._run.batch_sizes, step, before['examples']
            )
        self._report.progress.message(text)

    def _report_version_changes(self, meta: Mapping[str, Any]) -> None:
        """Says so if a checkpoint was saved with other versions of Python or of packages."""
        before, now = meta.get('versions', {}), versions()
        changes = [
            f'{name} {version} -> {now[name]}'
            for name, version in before.items()
            if name in now and now[name] != version
        ]
        if changes:
            self._report.progress.message(
                f'The checkpoint was saved with other versions: {", ".join(changes)}. The run may '
                'continue with other roundings.'
            )

    def _check_batch_sizes(self) -> None:
        """Raises a UserError if the run cannot resume with the experiment's batch size."""
        run = self._run
        # Raised only now, and not by `open_run`: evaluating with another batch size is possible all
        # the same.
        if run.refusal is not None:
            raise run.refusal
        # Another Trainer may have trained in this directory since `open_run` read it; the schedules
        # of this one are built for the old batch sizes.
        now = BatchSizes.from_run(run.workdir, run.experiment.clock.batch_size)
        if now != run.batch_sizes and run.workdir is not None:
            raise UserError(
                f'the batch size of the run in {run.workdir.path} has changed since this Trainer '
                'was created; create a new one'
            )

    def _latest_step(self) -> int | None:
        return None if self._run.checkpoints is None else self._run.checkpoints.latest()

    def _measurements(self, step: int) -> dict[str, Any]:
        names = [n for n in self._run.experiment.evals if self._report.has_eval(n, step)]
        measured = {'evaluated': names, 'metrics': dict(self._report.latest)}
        if self.early_stopping is not None:
            measured['early_stopping'] = self.early_stopping.state()
        return measured

    def follow(self, evaluation: str, values: Mapping[str, float]) -> str | None:
        """Counts an evaluation for early stopping.

        Args:
            evaluation: name of the evaluation.
            values: metrics of the evaluation by name. Without the metric that early stopping
                watches, nothing is counted.

        Returns:
            A message if the run ends because of it, None otherwise.
        """
        early = self.early_stopping
        if early is None or early.rule.metric not in {f'eval/{evaluation}/{n}' for n in values}:
            return None
        before = early.stopped
        early.update(evaluation, values)
        return early.reason() if early.stopped and not before else None

    def _restore_early_stopping(self, meta: Mapping[str, Any]) -> None:
        if self.early_stopping is not None:
            self.early_stopping.restore(meta.get('early_stopping'))
