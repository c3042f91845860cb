# SPDX-License-Identifier: Apache-2.0
"""Calls the hooks of `config.hooks`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax

from trainer.config.errors import UserError
from trainer.experiment import Experiment
from trainer.hooks import Event
from trainer.observe.summaries import as_summary
from trainer.parallel import processes
from trainer.parallel.handshake import EXIT_PEER_FAILED
from trainer.parallel.signals import StopRequest
from trainer.run import failure
from trainer.run.reporter import Reporter
from trainer.run.workdir import Workdir
from trainer.step.state import TrainState
from trainer.tasks.measured import MetricValues

_log = logging.getLogger('trainer')


class PeerHookError(UserError):
    """A hook failed in another process; all processes have saved and stopped because of it."""

    exit_code = EXIT_PEER_FAILED


class Hooks:
    """The hooks of a run.

    A hook that fails ends the run. With several processes, none can save alone: they all stop after
    the same step, and the remaining hooks are called until then.

    Attributes:
        error: the first error of a hook, if the processes were asked to stop because of it.
    """

    def __init__(self, experiment: Experiment, workdir: Workdir | None, report: Reporter):
        """Calls nothing yet.

        Args:
            experiment: has the hooks and the config.
            workdir: the run's directory, or None.
            report: the run's rows.
        """
        self.error: Exception | None = None
        self._experiment = experiment
        self._workdir = workdir
        self._hooks = dict(experiment.hooks)
        self._report = report
        self._started = False

    def call(self, kind: str, step: int, state: TrainState, stop: StopRequest, **more: Any) -> None:
        """Calls all hooks at an event before the end, and writes the row that is held.

        Args:
            kind: `Event.kind`.
            step: number of completed updates.
            state: at this step.
            stop: receives the request to stop if a hook fails and there are several processes.
            **more: further attributes of the event.
        """
        if not self._hooks:
            self._report.write_row()
            return
        # Before the calls: if a hook fails at 'start', those called before it must still get their
        # 'end'.
        if kind == 'start':
            self._started = True
        event = self._event(kind, step, state, **more)
        try:
            with self._report.time.measure('hooks'):
                self._call_each(event, stop)
        finally:
            # Also if a hook has failed: the row was held for the values of hooks only.
            self._report.write_row()

    def _call_each(self, event: Event, stop: StopRequest) -> None:
        returned = MetricValues()
        for name, hook in list(self._hooks.items()):
            try:
                add_returned(returned, hook(event), name, event.kind)
            except Exception as error:
                # With several processes the error is raised later, by `raise_deferred`: raised
                # here, it would leave the others waiting in their next collective.
                if not stop.ask():
                    raise
                _log.warning('config.hooks.%s failed at step %d', name, event.step, exc_info=error)
                self.error = self.error or error
                # Not called again: it would probably fail at each event until all processes have
                # stopped.
                del self._hooks[name]
        if event.kind == 'eval' and jax.process_count() > 1:
            # Early stopping and retention decide by these values: alike in all processes.
            numbers = processes.gather(dict(returned))[0]
            returned.clear()
            returned.update(numbers)
        if returned or returned.arrays or returned.summaries:
            self._report.extend_row(returned)

    def raise_deferred(self, step: int) -> None:
        """Raises the error of a hook because of which all processes stopped; all must call it.

        Args:
            step: where they stopped.

        Raises:
            PeerHookError: if only hooks of other processes have failed.
        """
        own_error = None if self.error is None else failure.summary(self.error)
        # Decided by the config, which is the same everywhere: `self._hooks` may differ by a hook
        # that failed in one process, and then some would not join the collective.
        texts = enumerate(processes.gather(own_error) if self._experiment.hooks else ())
        others = [f'process {number}: {text}' for number, text in texts if text is not None]
        if self.error is not None:
            raise self.error
        if others:
            raise PeerHookError(
                f'a hook failed in another process, so all processes stopped at step {step:,}. '
                f'{"; ".join(others)}'
            )

    def add_note_to(self, error: BaseException) -> None:
        """Adds a note to an error if a hook had failed before it."""
        if self.error is not None and self.error is not error:
            error.add_note(f'A hook had failed before: {failure.summary(self.error)}')

    def end(
        self, step: int, state: TrainState | None, status: str, error: str | None = None
    ) -> None:
        """Calls all hooks at the end, even if one of them fails.

        Args:
            step: number of completed updates.
            state: at this step, None if the run has failed.
            status: of the run.
            error: of the run; if there is one, errors of hooks are only logged.
        """
        if not self._started:
            return
        self._started = False
        # A hook that fails must not keep the others from their 'end', where they close what they
        # opened.
        event = self._event('end', step, state, status=status, error=error)
        errors = []
        for hook in self._hooks.values():
            try:
                hook(event)
            except Exception as hook_error:
                errors.append(hook_error)
        for each in errors[1:] if error is None else errors:
            _log.warning("a hook failed at the 'end' event: %s", failure.summary(each))
        if errors and error is None:
            raise errors[0]

    def end_failed(self, error: BaseException) -> None:
        """Calls all hooks at the end of a failed run; a hook that fails causes only a warning."""
        self.end(self._report.step, None, failure.status(error), failure.summary(error))

    def _event(self, kind: str, step: int, state: TrainState | None, **more: Any) -> Event:
        if kind == 'log':
            # Waits for the row, so that a hook gets the row and the state of the same step.
            self._report.hold_row()
        return Event(
            kind=kind,
            step=step,
            state=state,
            # A copy: a hook may keep the event, and the reporter keeps updating its own dict.
            metrics=dict(self._report.latest),
            workdir=None if self._workdir is None else str(self._workdir.path),
            row=self._report.row if kind in ('log', 'eval') else {},
            config=self._experiment.origin.config,
            **more,
        )


def add_returned(values: MetricValues, returned: Any, hook: str, kind: str) -> None:
    """Adds what a hook has returned to the values of an event.

    Args:
        values: those that hooks have returned at this event so far.
        returned: None, or a dict of numbers, arrays, texts and images by name.
        hook: name of the hook, for messages.
        kind: of the event.

    Raises:
        UserError: for anything else, and at events that have no row.
    """
    if returned is None:
        return
    where = f'config.hooks.{hook}'
    if not isinstance(returned, Mapping):
        raise UserError(
            f'{where} returned {type(returned).__name__}; expected None, or a dict of values by '
            "name for the event's row, such as {'bleu': 0.3}"
        )
    if returned and kind not in ('log', 'eval'):
        raise UserError(
            f'{where} returned {", ".join(map(str, returned))} at a {kind!r} event, which has no '
            "row of metrics; return values at 'log' or 'eval', and None otherwise"
        )
    try:
        for name, value in returned.items():
            summary = as_summary(value)
            values.add(str(name), value if summary is None else summary)
    except UserError as error:
        raise UserError(f'{where}: {error}') from error
