# SPDX-License-Identifier: Apache-2.0
"""What a process writes down when it is about to end at once, by `os._exit`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

# A disk that hangs may be the reason for the end.
_LIMIT_SECS = 1.0
_speakers: list[Callable[[str, str], None]] = []


@contextlib.contextmanager
def registered(speak: Callable[[str, str], None], *, stay: bool = False) -> Iterator[None]:
    """While the context is open, `say` calls `speak(status, message)`.

    Args:
        speak: what writes them down.
        stay: also after an error: one of several processes may have failed for want of another, and
            finds that out a moment later.
    """
    _speakers.append(speak)
    try:
        yield
    except BaseException:
        if not stay:
            _speakers.remove(speak)
        raise
    else:
        _speakers.remove(speak)


def say(status: str, message: str) -> None:
    """Lets runs write how they end; comes back within a second, whatever they meet.

    Args:
        status: for `result.json`.
        message: why the process ends.
    """

    def speak() -> None:
        for each in list(_speakers):
            with contextlib.suppress(Exception):
                each(status, message)

    # In another thread: a lock that it needs may be held by the one that a signal has interrupted.
    thread = threading.Thread(target=speak, name='last-words', daemon=True)
    thread.start()
    thread.join(_LIMIT_SECS)
