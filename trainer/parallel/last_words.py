# SPDX-License-Identifier: Apache-2.0
"""Functions that record the end of a process just before it exits by `os._exit`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

# A hanging disk may be the reason for the exit.
_LIMIT_SECS = 1.0
_recorders: list[Callable[[str, str], None]] = []


@contextlib.contextmanager
def register(record_one: Callable[[str, str], None], *, stay: bool = False) -> Iterator[None]:
    """While the context is open, `record` calls `record_one(status, message)`.

    Args:
        record_one: records the status and the message.
        stay: whether it stays registered after an error: a process may fail because another one
            did, which shows only a moment later.
    """
    _recorders.append(record_one)
    try:
        yield
    except BaseException:
        if not stay:
            _recorders.remove(record_one)
        raise
    else:
        _recorders.remove(record_one)


def record(status: str, message: str) -> None:
    """Calls the registered functions; returns within a second, even if they hang.

    Args:
        status: how the run ended, as in `result.json`.
        message: why the process ends.
    """

    def record_one() -> None:
        for each in list(_recorders):
            with contextlib.suppress(Exception):
                each(status, message)

    # In another thread: the thread that a signal has interrupted may hold a lock that is needed.
    thread = threading.Thread(target=record_one, name='last-words', daemon=True)
    thread.start()
    thread.join(_LIMIT_SECS)
