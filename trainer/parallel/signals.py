# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C as a wish to stop after the current step, with everything saved."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from types import FrameType

EXIT_INTERRUPTED = 130
EXIT_PREEMPTED = 42


@dataclasses.dataclass
class StopRequest:
    """What a signal handler leaves for the loop to find.

    Attributes:
        signal: the number of the first signal that arrived, or None.
    """

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of a run that ended by this request with its state saved."""
        return EXIT_PREEMPTED if self.signal == signal.SIGTERM else EXIT_INTERRUPTED

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Asks for a stop; a second Ctrl-C leaves at once, the last committed save intact."""
        if self.signal is not None and number == signal.SIGINT:
            _say('\nStopped at once, without saving.\n')
            os._exit(EXIT_INTERRUPTED)
        if self.signal is None:
            self.signal = number
            name = signal.Signals(number).name
            hint = '; Ctrl-C again to stop at once' if number == signal.SIGINT else ''
            _say(f'\n{name}: saving after this step{hint}.\n')


def _say(text: str) -> None:
    # os.write and not print: a handler may run in the middle of another print. And whoever reads
    # our messages may be gone, which must not keep us from saving.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), text.encode())


def install() -> StopRequest:
    """Installs the handlers of a single-process run; the caller must be the main thread."""
    request = StopRequest()
    signal.signal(signal.SIGTERM, request.handle)
    signal.signal(signal.SIGINT, request.handle)
    return request
