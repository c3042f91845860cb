# SPDX-License-Identifier: Apache-2.0
"""Calls the hooks of `config.hooks`."""

from __future__ import annotations

import logging
from typing import Any

from trainer.config.errors import UserError
from trainer.experiment import Experiment
from trainer.hooks import Event
from trainer.parallel import processes
from trainer.parallel.handshake import EXIT_PEER_FAILED
from trainer.parallel.signals import StopRequest
from trainer.run import failure
from trainer.run.reporter import Reporter
from trainer.run.workdir import Workdir
from trainer.step.state import TrainState

_log = logging.getLogger('trainer')


class PeerHookError(UserError):
    """A hook has failed in another process, and all have stopped for it with everything saved."""

    exit_code = EXIT_PEER_FAILED


class Hooks:
    """The hooks of a run.

    A hook that fails ends the run. One process alone cannot save, so several stop after a step that
    all agree on, and the other hooks are called until then.

    Attributes:
        error: that of the first hook that failed, if the processes were asked to stop for it.
    """

    def __init__(self, experiment: Experiment, workdir: Workdir | None, report: Reporter):
        """Calls nothing yet.

        Args:
            experiment: whose hooks and config.
            workdir: the run's directory, or None.
            report: the run's rows.
        """
        self.error: Exception | None = None
        self._experiment = experiment
        self._workdir = workdir
        self._hooks = dict(experiment.hooks)
        self._report = report
        self._begun = False

    def call(self, kind: str, step: int, state: TrainState, stop: StopRequest, **more: Any) -> None:
        """Calls all hooks at an event before the end.

        Args:
            kind: of `Event`, like all others.
            step: number of completed updates.
            state: at this step.
            stop: asked to stop if a hook fails, where that stops several processes.
            **more: other attributes of the event.
        """
        if not self._hooks:
            return
        if kind == 'start':
            self._begun = True
        event = self._event(kind, step, state, **more)
        for name, hook in list(self._hooks.items()):
            try:
                hook(event)
            except Exception as error:
                if not stop.ask():
                    raise
                _log.warning('config.hooks.%s failed at step %d', name, step, exc_info=error)
                self.error = self.error or error
                del self._hooks[name]

    def raise_late(self, step: int) -> None:
        """Raises the error of a hook for which the processes have stopped; all must call it.

        Args:
            step: at which they have.

        Raises:
            PeerHookError: where only hooks of other processes have failed.
        """
        mine = None if self.error is None else failure.summary(self.error)
        found = enumerate(processes.gather(mine) if self._experiment.hooks else ())
        others = [f'process {number}: {text}' for number, text in found if text is not None]
        if self.error is not None:
            raise self.error
        if others:
            raise PeerHookError(
                f'a hook has failed in another process, and all stopped at step {step:,}. '
                f'{"; ".join(others)}'
            )

    def note_on(self, error: BaseException) -> None:
        """Adds to an error that a hook had failed before it."""
        if self.error is not None and self.error is not error:
            error.add_note(f'A hook had failed before: {failure.summary(self.error)}')

    def end(
        self, step: int, state: TrainState | None, status: str, error: str | None = None
    ) -> None:
        """Calls all hooks at the end, whatever one of them does.

        Args:
            step: number of completed updates.
            state: at this step, None if the run has failed.
            status: of the run.
            error: of the run; then the errors of hooks are only logged.
        """
        if not self._begun:
            return
        self._begun = False
        event = self._event('end', step, state, status=status, error=error)
        errors = []
        for hook in self._hooks.values():
            try:
                hook(event)
            except Exception as found:
                errors.append(found)
        for each in errors[1:] if error is None else errors:
            _log.warning("a hook failed at the 'end' of this run: %s", failure.summary(each))
        if errors and error is None:
            raise errors[0]

    def end_failed(self, error: BaseException) -> None:
        """Calls all hooks at the end of a failed run; if one of them fails, it warns."""
        self.end(self._report.step, None, failure.status(error), failure.summary(error))

    def _event(self, kind: str, step: int, state: TrainState | None, **more: Any) -> Event:
        if kind == 'log':
            # Waits for the row's step, so that a hook gets row and state of the same step.
            self._report.flush()
        return Event(
            kind=kind,
            step=step,
            state=state,
            metrics=dict(self._report.latest),
            workdir=None if self._workdir is None else str(self._workdir.path),
            row=self._report.row if kind in ('log', 'eval') else {},
            config=self._experiment.origin.config,
            **more,
        )
