# SPDX-License-Identifier: Apache-2.0
"""Lets a process record its end before it exits at once, by `os._exit`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

# A hanging disk may be the reason for the exit.
_LIMIT_SECS = 1.0
_speakers: list[Callable[[str, str], None]] = []


@contextlib.contextmanager
def registered(speak: Callable[[str, str], None], *, stay: bool = False) -> Iterator[None]:
    """While the context is open, `say` calls `speak(status, message)`.

    Args:
        speak: records them.
        stay: keep it registered after an error: a process may fail because another one has, and
            find that out a moment later.
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
    """Calls the registered functions; returns within a second, even if they hang.

    Args:
        status: for `result.json`.
        message: why the process ends.
    """

    def speak() -> None:
        for each in list(_speakers):
            with contextlib.suppress(Exception):
                each(status, message)

    # In another thread: the thread that a signal has interrupted may hold a lock that it needs.
    thread = threading.Thread(target=speak, name='last-words', daemon=True)
    thread.start()
    thread.join(_LIMIT_SECS)
