# SPDX-License-Identifier: Apache-2.0
"""Calls the hooks of `config.hooks`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from trainer.builders.hooks import HookRules
from trainer.config import python_objects
from trainer.config.errors import UserError
from trainer.experiment import Experiment
from trainer.hooks import Event
from trainer.observe.summaries import with_summaries
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

    A hook that fails ends the run, unless its `on_error` is 'warn'. With several processes, none
    can save alone: they all stop after the same step, and the remaining hooks are called until
    then.

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

    def call(
        self,
        kind: str,
        step: int,
        state: TrainState,
        stop: StopRequest,
        *,
        only: Sequence[str] | None = None,
        **more: Any,
    ) -> None:
        """Calls hooks at an event before the end, and writes the open row.

        Args:
            kind: `Event.kind`.
            step: number of completed updates.
            state: train state after this step.
            stop: receives the request to stop if a hook fails and there are several processes.
            only: names of the hooks to call; by default all, but at 'log', 'eval' and 'save' those
                without a period.
            **more: further attributes of the event.
        """
        names = self._names_for(kind) if only is None else only
        if not names:
            self._report.write_row()
            return
        # Before the calls: if a hook fails at 'start', those called before it must still get their
        # 'end'.
        if kind == 'start':
            self._started = True
        event = self._event(kind, step, state, **more)
        try:
            with self._report.time.measure('hooks'):
                self._call_each(names, event, stop)
        finally:
            # Also if a hook has failed: the row was left open only for the values of hooks.
            self._report.write_row()

    def _names_for(self, kind: str) -> list[str]:
        # By the config and not by `self._hooks`, which may lack a hook that has failed in this
        # process only: all processes must take part in the exchange of values.
        every = kind not in ('log', 'eval', 'save')
        hooks = self._experiment.hooks
        return [name for name in hooks if every or self._rules(name).every is None]

    def _rules(self, name: str) -> HookRules:
        return self._experiment.hook_rules.get(name) or HookRules()

    def _call_each(self, names: Sequence[str], event: Event, stop: StopRequest) -> None:
        returned: dict[str, MetricValues] = {}
        for name in names:
            if name not in self._hooks:  # It has failed.
                continue
            try:
                returned[name] = returned_values(self._hooks[name](event), name, event.kind)
            except Exception as error:
                self._handle(error, name, event, stop)
        if event.kind == 'eval' and jax.process_count() > 1:
            # Early stopping and retention decide by these values: alike in all processes.
            numbers = processes.gather({name: dict(each) for name, each in returned.items()})[0]
            for name in names:
                values = returned.setdefault(name, MetricValues())
                values.clear()
                values.update(numbers.get(name, {}))
        for name, values in returned.items():
            if not (values or values.arrays or values.summaries):
                continue
            try:
                if event.kind == 'step':
                    self._report.record_hook(name, event.step, values)
                else:
                    self._report.extend_row(values)
            except UserError as error:
                named = UserError(f'config.hooks.{name}: {error}').with_traceback(
                    error.__traceback__
                )
                self._handle(named, name, event, stop)

    def _handle(self, error: Exception, name: str, event: Event, stop: StopRequest) -> None:
        """Raises the error of a hook, or logs it, as its `on_error` and other processes require."""
        text = f"config.hooks.{name} failed at event '{event.kind}' of step {event.step:,}"
        if self._rules(name).on_error == 'warn':
            _log.warning('%s; the run continues', text, exc_info=error)
            return
        # With several processes the error is raised later, by `raise_deferred`: raised here, it
        # would leave the others waiting in their next collective.
        if not stop.ask():
            raise error
        _log.warning('%s', text, exc_info=error)
        self.error = self.error or error
        # Not called again: it would probably fail at each event until all processes have stopped.
        del self._hooks[name]

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
            state: train state after this step, None if the run has failed.
            status: how the run ended, as in `result.json`.
            error: error that ended the run; if there is one, errors of hooks are only logged.
        """
        if not self._started:
            return
        self._started = False
        # A hook that fails must not keep the others from their 'end', where they close what they
        # opened.
        event = self._event('end', step, state, status=status, error=error)
        errors: list[Exception] = []
        for name, hook in self._hooks.items():
            try:
                returned_values(hook(event), name, 'end')
            except Exception as hook_error:
                # One error is raised, unless the run has one of its own; the others are logged.
                if error is None and not errors and self._rules(name).on_error == 'stop':
                    errors.append(hook_error)
                else:
                    _log.warning("config.hooks.%s failed at event 'end'", name, exc_info=hook_error)
        if errors:
            raise errors[0]

    def end_failed(self, error: BaseException) -> None:
        """Calls all hooks at the end of a failed run; a hook that fails causes only a warning."""
        self.end(self._report.step, None, failure.status(error), failure.summary(error))

    def _event(self, kind: str, step: int, state: TrainState | None, **more: Any) -> Event:
        if kind == 'log':
            # Waits for the row, so that a hook gets the row and the state of the same step.
            self._report.open_row()
        return Event(
            kind=kind,
            step=step,
            state=state,
            # A copy: a hook may keep the event, and the reporter keeps updating its own dict.
            metrics=dict(self._report.latest),
            workdir=None if self._workdir is None else str(self._workdir.path),
            row=self._report.row if kind in ('log', 'eval') else {},
            config=python_objects.copy_as_dicts(self._experiment.origin.config),
            **more,
        )


def returned_values(returned: Any, hook: str, kind: str) -> MetricValues:
    """Returns what a hook has returned as values for a row.

    Args:
        returned: None, or a dict of numbers, arrays, texts and images by name.
        hook: name of the hook, for messages.
        kind: `Event.kind`.

    Raises:
        UserError: for anything else, and at events that have no row.
    """
    values = MetricValues()
    if returned is None:
        return values
    where = f'config.hooks.{hook}'
    if not isinstance(returned, Mapping):
        raise UserError(
            f'{where} returned {type(returned).__name__}; expected None, or a dict of values by '
            "name for the event's row, such as {'bleu': 0.3}"
        )
    if returned and kind not in ('log', 'eval', 'step'):
        raise UserError(
            f'{where} returned {", ".join(map(str, returned))} at event {kind!r}, which has no row '
            "of metrics; return values at 'log', 'eval' or 'step', and None otherwise"
            # The row of a last evaluation is what such a hook needs.
            + (" (the last 'eval' comes before 'end')" if kind == 'end' else '')
        )
    try:
        for name, value in returned.items():
            values.add(str(name), with_summaries(str(name), value))
    except UserError as error:
        raise UserError(f'{where}: {error}') from error
    full = [name for name in values if name.startswith(('train/', 'eval/'))]
    if kind == 'step' and full:
        raise UserError(
            f"{where} returned {', '.join(full)} at a 'step' event, whose row has only names "
            f"'hook/{hook}/...'; return short names, or leave out {where}.every and return them "
            "at 'log' or 'eval'"
        )
    return values
