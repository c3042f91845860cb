# SPDX-License-Identifier: Apache-2.0
"""Profiles a window of steps, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
from etils import epath


@dataclasses.dataclass(frozen=True)
class Window:
    """A range of consecutive steps.

    Attributes:
        start: number of completed steps when the trace begins.
        stop: number of completed steps when it ends.
    """

    start: int
    stop: int


class Profile:
    """Traces a window of a run into `profile/` of its work directory.

    A run that begins or ends inside the window traces the steps that it runs.
    """

    def __init__(self, window: Window | None, directory: epath.Path | None):
        """Traces nothing yet.

        Args:
            window: the steps to trace, or None.
            directory: the work directory, or None to trace nothing.
        """
        self._window = window if directory is not None else None
        self._directory = None if directory is None else directory / 'profile'
        self._running = False
        # The annotation of the current step, while a trace is running.
        self._annotation: jax.profiler.StepTraceAnnotation | None = None

    def begin_step(self, step: int) -> None:
        """Annotates the step that is dispatched next, if a trace is running.

        XProf derives step times from the annotation. It ends where the next step or an event
        begins, because the call itself returns long before the devices are done.

        Args:
            step: number of completed updates after it; after the last one of fused steps.
        """
        if not self._running:
            return
        self._end_step()
        self._annotation = jax.profiler.StepTraceAnnotation('train', step_num=step)
        # Not a `with` block: the annotation ends in another call.
        self._annotation.__enter__()

    def annotate_eval(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Returns a context that annotates an evaluation, if a trace is running."""
        if not self._running:
            return contextlib.nullcontext()
        return jax.profiler.TraceAnnotation(f'eval {name}')

    def update(self, step: int, state: Any) -> str | None:
        """Starts or ends the trace at the window's borders; called at steps with an event.

        Args:
            step: number of completed updates.
            state: the newest state; the trace starts and ends when it is computed.

        Returns:
            A message for the user, or None.
        """
        if self._window is None:
            return None
        # A range: a resumed run may begin inside of the window.
        if not self._running and self._window.start <= step < self._window.stop:
            # The steps before the window are still queued: without this they would be in the trace.
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif self._running and step >= self._window.stop:
            return self.close(state)
        self._end_step()
        return None

    def close(self, state: Any = None) -> str | None:
        """Ends the trace if one is running; returns a message for the user, or None."""
        if not self._running:
            return None
        # First: if a failed step raises below, no later call tries to end the trace again.
        self._running = False
        jax.block_until_ready(state)
        self._end_step()
        jax.profiler.stop_trace()
        return f'Trace written to {self._directory}: tensorboard --logdir {self._directory}'

    def _end_step(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
