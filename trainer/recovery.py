# SPDX-License-Identifier: Apache-2.0
"""What a run keeps, so that it goes on where it stopped as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from trainer.batch_sizes import place_in_other_data, resized
from trainer.config import diff
from trainer.config.errors import UserError
from trainer.consumed import Consumed
from trainer.inputs import data_changes, fingerprint
from trainer.observe.reporter import Reporter
from trainer.parallel import processes
from trainer.parts import Parts
from trainer.prefetch import Prefetcher
from trainer.step.state import TrainState
from trainer.workdir import describe_run, versions


class Recovery:
    """Starts a run from what the last one kept, and keeps what the next one needs.

    That is the state, in a checkpoint or between two calls in memory, and beside it what the host
    has counted: the digest of the data, the newest metrics, the evaluations of the saved step.

    Attributes:
        early_stopping: what ends the run before its time, or None.
    """

    def __init__(
        self,
        parts: Parts,
        report: Reporter,
        *,
        allow_config_change: bool = False,
        overrides: Mapping[str, str] | None = None,
    ):
        """Reads and writes nothing yet.

        Args:
            parts: whose checkpoints and work directory.
            report: the run's metrics.
            allow_config_change: go on with a run although the config makes it another one.
            overrides: the command line's, for `run.json`.
        """
        self._parts = parts
        self._report = report
        self._allow_config_change = allow_config_change
        self._overrides = dict(overrides or {})
        self._consumed = Consumed(parts.experiment.data)
        # An own one: two runs of one experiment count for themselves.
        early = parts.experiment.early_stopping
        self.early_stopping = None if early is None else dataclasses.replace(early)
        # Without a work directory the next call goes on from here.
        self._paused: tuple[TrainState, int] | None = None

    def check(self) -> None:
        """Refuses a work directory whose checkpoints are of another run, or of a longer one.

        Raises:
            UserError: naming what differs, unless that is allowed; or the step that is already
                behind the end of this run; or what the processes of the run do not agree on.
        """
        workdir, experiment = self._parts.workdir, self._parts.experiment
        self._parts.check_agreement()
        latest = self._latest()
        if workdir is None or latest is None:
            self._parts.check_batch_sizes()
            return
        if not self._allow_config_change:
            workdir.check_same_run(experiment.config, experiment.schedule_steps)
        self._parts.check_batch_sizes()
        if latest > experiment.total_steps:
            raise UserError(
                f'{workdir.path} is at step {latest:,}, but config.train_for asks for '
                f'{experiment.total_steps:,} steps. Name another --workdir, or a longer '
                '--config.train_for.'
            )

    def start(self) -> tuple[TrainState, int]:
        """Returns the state that the run starts from, restored or fresh, and its step."""
        if self._paused is not None:
            # Its buffers are donated to the next step: whatever happens, it is used once.
            paused, self._paused = self._paused, None
            self._consumed.go_on(paused[1])
            return paused
        latest, checkpoints = self._latest(), self._parts.checkpoints
        if checkpoints is None or latest is None:
            self._report.restore(0, {}, ())
            # An earlier call may have failed, and has left behind what it had counted.
            self._consumed.restart()
            self._restore_early_stopping({})
            return self._parts.init_state(), 0
        if self._parts.workdir is not None and processes.is_primary():
            # A run that goes on there would delete what is read here.
            self._parts.workdir.claim()
        state = self._parts.restore(latest)
        if self._allow_config_change:
            state = self._parts.as_configured(state)
        meta = checkpoints.meta(latest)
        if not self._consumed.restore(latest, meta, begin_anew=self._allow_config_change):
            self._report.progress.message('The data begins anew: see --allow_config_change.')
        self._tell_data_changes(latest, meta)
        self._restore_early_stopping(meta)
        self._report.restore(latest, meta['metrics'], meta['evaluated'])
        return state, latest

    def open(self, step: int) -> None:
        """Opens the run's files over those of the run that goes on from `step`."""
        workdir, experiment = self._parts.workdir, self._parts.experiment
        if workdir is None or not processes.is_primary():
            return
        workdir.claim()
        run = describe_run(self._overrides)
        changes = workdir.begin(experiment.config, experiment.schedule_steps, run)
        if changes and step > 0:
            self._report.progress.message(f'The config has changed:\n{diff.format_diff(changes)}')
        before = self._parts.batch_sizes.changed_at(step)
        if before is not None:
            self._report.progress.message(resized(self._parts, step, before))
        self._report.open(workdir.path, step, tensorboard=experiment.tensorboard)

    def count(self, batches: Prefetcher, step: int) -> None:
        """Counts the batches that the run has consumed up to a step."""
        self._report.time.set('data wait', batches.wait_secs)
        self._consumed.add(batches, step)

    def check_saves(self) -> None:
        """Raises what a save in the background has failed of; does not wait for one."""
        if self._parts.checkpoints is not None:
            self._parts.checkpoints.check()

    def save(self, step: int, state: TrainState) -> bool:
        """Starts a save, unless this step has one; returns whether it did."""
        checkpoints = self._parts.checkpoints
        if checkpoints is None or checkpoints.has(step):
            return False
        with self._report.time.spent('save'):
            # All rows up to this step are on disk before its save starts, so that a resumed run
            # neither misses a row nor writes it twice.
            self._report.sync()
            meta = {
                'step': step,
                **self._measured(step),
                **self._consumed.meta(),
                'batch_sizes': self._parts.batch_sizes.parts,
                'examples': self._parts.batch_sizes.examples(step),
                'data': self._fingerprint,
                'versions': versions(),
                'config': diff.to_jsonable(self._parts.experiment.config),
            }
            checkpoints.save(step, state, meta)
        return True

    def amend(self, step: int) -> None:
        """Adds to the checkpoint of a step what evaluations have measured since it was saved."""
        if self._parts.checkpoints is not None:
            self._report.sync()
            self._parts.checkpoints.amend(step, self._measured(step))

    def end(self, status: str, step: int, state: TrainState) -> None:
        """Waits for the saves, and writes `result.json` if the run is not merely paused."""
        checkpoints, workdir = self._parts.checkpoints, self._parts.workdir
        if checkpoints is None or workdir is None:
            self._paused = (state, step)
            return
        with self._report.time.spent('save'):
            checkpoints.close()
        if status != 'paused':
            digest, metrics = checkpoints.meta(step)['digest'], dict(self._report.latest)
            data_digest = self._consumed.digest()
            if processes.is_primary():
                workdir.write_result(status, step, digest, data_digest, metrics)
        workdir.release()

    def abandon(self, error: BaseException) -> None:
        """Closes what is open when the run fails; a save on its way gets there before."""
        if self._parts.checkpoints is not None:
            try:
                self._parts.checkpoints.close()
            except Exception as late:
                error.add_note(f'A save in the background had failed too: {late!r}')
        with contextlib.suppress(OSError):
            self._report.close()
        if self._parts.workdir is not None:
            self._parts.workdir.release()

    @functools.cached_property
    def _fingerprint(self) -> dict[str, Any] | None:
        """What tells the training data from other data; None of a loader that has no first one."""
        data = self._parts.experiment.data
        return fingerprint(data) if hasattr(data, 'first') else None

    def _tell_data_changes(self, step: int, meta: Mapping[str, Any]) -> None:
        """Says that the data is not what it was when a checkpoint was saved."""
        before, now = meta.get('data'), self._fingerprint
        if not before or not now or not (changes := data_changes(before, now)):
            return
        text = f'Warning: the training data has changed: {"; ".join(changes)}.'
        if before['examples'] != now['examples']:
            text += ' ' + place_in_other_data(self._parts, step, before['examples'])
        self._report.progress.message(text)

    def _latest(self) -> int | None:
        return None if self._parts.checkpoints is None else self._parts.checkpoints.latest()

    def _measured(self, step: int) -> dict[str, Any]:
        names = [n for n in self._parts.experiment.evals if self._report.has_eval(n, step)]
        measured = {'evaluated': names, 'metrics': dict(self._report.latest)}
        if self.early_stopping is not None:
            measured['early_stopping'] = self.early_stopping.state()
        return measured

    def _restore_early_stopping(self, meta: Mapping[str, Any]) -> None:
        if self.early_stopping is not None:
            self.early_stopping.restore(meta.get('early_stopping'))
