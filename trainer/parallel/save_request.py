# SPDX-License-Identifier: Apache-2.0
"""SIGUSR1 makes a run save after the current step, and continue.

Batch systems send it some time before they end a job. All processes of a run save after the same
step, whichever of them has received the signal.

The command line imports this module before all others, so it uses only a little of the standard
library.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from types import FrameType
from typing import Any

_POLL_SECS = 1.0
# All processes answer within two polls, unless one is about to end.
_ANSWER_SECS = 60.0


class SaveRequest:
    """A request to save that a signal handler sets and the training loop polls."""

    def __init__(self) -> None:
        """Nothing is requested yet."""
        self._requested = False
        self._agreement: _Agreement | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Requests a save; a handler of a signal."""
        self._requested = True
        # `os.write`, not `print`: a handler may run in the middle of another print.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), b'\nSIGUSR1: saving after this step, and continuing.\n')

    def share(self, client: Any, number: int, count: int) -> None:
        """Makes all processes save together.

        Args:
            client: key-value store of the processes.
            number: index of this process.
            count: number of processes.
        """
        self._agreement = _Agreement(client, number, count)

    def poll(self, step: int) -> bool:
        """Returns whether to save now; with several processes all poll after the same steps.

        Args:
            step: number of dispatched steps.
        """
        requested, self._requested = self._requested, False
        if self._agreement is None:
            return requested
        return self._agreement.poll(step, requested)


class _Agreement:
    """Agrees with the other processes on the step after which all of them save.

    The main threads must not wait for each other: one may wait for another's part of a step. So a
    thread of each process holds its main thread back at its next poll, reads the step of its last
    one, and exchanges it with the others; all save at the first poll that none of them has passed.
    """

    def __init__(self, client: Any, number: int, count: int):
        self._client, self._number, self._count = client, number, count
        self._lock = threading.Lock()
        self._step = -1
        # Several, if a request follows before this process has reached the step of the one before.
        self._save_after: set[int] = set()
        self._round = 0
        threading.Thread(target=self._watch, name='save-request', daemon=True).start()

    def poll(self, step: int, requested: bool) -> bool:
        if requested:
            self._client.key_value_set(self._key('request'), 'save', allow_overwrite=True)
        with self._lock:
            self._step = step
            due = {passed for passed in self._save_after if passed < step}
            self._save_after -= due
        return bool(due)

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL_SECS)
            try:
                self._client.key_value_try_get(self._key('request'))
            except Exception:  # Not requested; or the run is ending, and its store has gone.
                continue
            with self._lock:
                # A process that does not answer has ended: then there is nothing left to save.
                with contextlib.suppress(Exception):
                    self._save_after.add(max(self._exchange(self._step)))
                self._round += 1

    def _exchange(self, step: int) -> list[int]:
        self._client.key_value_set(self._key(str(self._number)), str(step))
        deadline_ms = int(1000 * _ANSWER_SECS)
        keys = [self._key(str(number)) for number in range(self._count)]
        return [int(self._client.blocking_key_value_get(key, deadline_ms)) for key in keys]

    def _key(self, name: str) -> str:
        return f'trainer/save/{self._round}/{name}'
