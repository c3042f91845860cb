# SPDX-License-Identifier: Apache-2.0
"""A window of steps whose trace is written for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
from etils import epath


@dataclasses.dataclass(frozen=True)
class Window:
    """Some consecutive steps.

    Attributes:
        start: the trace begins when this many steps are done.
        stop: and ends when this many are.
    """

    start: int
    stop: int


class Profile:
    """Traces a window of a run, into `profile/` of its directory.

    A run that begins or ends inside the window traces the part that it has.
    """

    def __init__(self, window: Window | None, directory: epath.Path | None):
        """Traces nothing yet, and nothing at all without a window or a directory."""
        self._window = window if directory is not None else None
        self._directory = directory
        self._running = False
        # The name of the step that runs, while a trace is being taken.
        self._name: jax.profiler.StepTraceAnnotation | None = None

    def begin_step(self, step: int) -> None:
        """Names the step that is dispatched next in a trace that is being taken.

        XProf derives the times of steps from it. It ends where the next step or an event begins:
        the call alone returns long before the devices are done.

        Args:
            step: number of completed updates after it; of several in one call, after the last.
        """
        if not self._running:
            return
        self._end_step()
        self._name = jax.profiler.StepTraceAnnotation('train', step_num=step)
        self._name.__enter__()

    def evaluation(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Returns the context of an evaluation: it is named in a trace that is being taken."""
        if not self._running:
            return contextlib.nullcontext()
        return jax.profiler.TraceAnnotation(f'eval {name}')

    def stepped(self, step: int, state: Any) -> str | None:
        """Handles steps with an event; returns what the user should know.

        At the window's borders the trace begins and ends.

        Args:
            step: number of completed updates.
            state: the newest state; the trace begins and ends when it is there.
        """
        if self._window is None:
            return None
        if not self._running and self._window.start <= step < self._window.stop:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif self._running and step >= self._window.stop:
            return self.close(state)
        self._end_step()
        return None

    def close(self, state: Any = None) -> str | None:
        """Ends a trace that is being taken."""
        if not self._running:
            return None
        self._running = False
        jax.block_until_ready(state)
        self._end_step()
        jax.profiler.stop_trace()
        return f'trace written to {self._directory}: tensorboard --logdir {self._directory}'

    def _end_step(self) -> None:
        if self._name is not None:
            self._name.__exit__(None, None, None)
            self._name = None
