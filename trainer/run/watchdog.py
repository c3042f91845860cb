# SPDX-License-Identifier: Apache-2.0
"""Ends a run that makes no progress, such as one whose data source waits forever for a disk.

A thread looks once a second whether the loop has done something since. A run that hangs would
otherwise occupy its devices until a person looks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from trainer.config.sections import WatchdogSection
from trainer.input.prefetch import Prefetcher
from trainer.observe import logfile
from trainer.parallel import last_words
from trainer.parallel.peer_watch import EXIT_HUNG
from trainer.parallel.signals import StopRequest
from trainer.run.reporter import Reporter

_TICK_SECS = 1.0
# A step may take this many times as long as the slowest one so far, whatever the limit.
_TIMES_SLOWEST = 20
# A pause of the whole process, such as by SIGSTOP, is no hang: it counts as this long.
_MOST_TICK_SECS = 5.0
# The key of each part's limit, and what to call the part.
_PARTS = {
    'steps': ('step_secs', 'the steps'),
    'compile': ('compile_secs', 'the start'),
    'eval': ('eval_secs', 'an evaluation'),
    'save': ('save_secs', 'a save'),
    'hooks': ('hook_secs', 'a hook'),
}
# How long a stopped run waits for its data before it saves without the next batch.
_STOP_SECS = 10.0
_WARN_SECS = 60.0


class Watchdog:
    """A thread that ends the process when the loop hangs."""

    def __init__(
        self,
        limits: WatchdogSection,
        report: Reporter,
        stop: StopRequest,
        save: Callable[[], bool],
    ):
        """Starts nothing: use it in a `with` block.

        Args:
            limits: seconds without progress, by part of the run.
            report: knows the step, and in which part of the run the loop is.
            stop: the request to stop.
            save: saves the last completed step from the watchdog's thread, if it can; returns
                whether nothing is lost.
        """
        self._limits = limits
        self._report, self._stop, self._save = report, stop, save
        self._batches: Prefetcher | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
        self._idle = _Idle()

    def __enter__(self) -> Watchdog:
        if self._stop.peers is not None:
            self._stop.peers.on_hang = end_hung_with
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()

    def follow(self, batches: Prefetcher) -> None:
        """Sets the batches for which the loop waits."""
        self._batches = batches

    def _watch(self) -> None:
        while not self._closing.wait(_TICK_SECS):
            part = self._report.time.current
            # Polls count the batches of evaluations as well as steps.
            self._idle.update((part, self._report.step, self._stop.polls), part == 'steps')
            if self._stop.signal is not None and self._waits_for_data(self._stop_secs()):
                self._leave()
            limit = self._limit(part)
            if limit is not None and self._idle.secs > limit:
                self._end(part, limit)
            elif self._idle.is_news and part == 'steps' and self._idle.secs > self._warn_secs():
                self._idle.is_news = False
                secs, place = self._idle.secs, self._describe_place(part)
                self._report.progress.message(f'Warning: no progress for {secs:.0f} s: {place}')

    def _limit(self, part: str) -> float | None:
        limit: float | None = getattr(self._limits, _PARTS[part][0])
        if limit is None or part != 'steps':
            return limit
        return max(limit, _TIMES_SLOWEST * self._idle.longest)

    def _announce(self) -> None:
        if self._stop.peers is not None:
            self._stop.peers.announce_hang()

    def _stop_secs(self) -> float:
        # Several processes cannot save without the next batch, so they wait longer for it.
        return _STOP_SECS if self._stop.peers is None else 6 * _STOP_SECS

    def _warn_secs(self) -> float:
        return max(_WARN_SECS, 5 * self._idle.longest)

    def _waits_for_data(self, secs: float) -> bool:
        return self._batches is not None and self._batches.waiting_secs() > secs

    def _describe_place(self, part: str) -> str:
        if part != 'steps':
            return f'in {_PARTS[part][1]} after step {self._report.step:,}'
        what = 'waiting for data' if self._waits_for_data(0) else 'in the loop'
        return f'{what} after step {self._report.step:,}'

    def _leave(self) -> None:
        """Saves and ends a run that should stop, but waits for its next batch."""
        name = self._stop.status or 'preempted'
        self._report.progress.message(
            f'The data has not arrived for {self._stop_secs():.0f} s: stopping without it.'
        )
        if self._save():
            last_words.record(name, 'stopped while the run waited for its data')
            _exit(self._stop.exit_code)
        self._announce()
        end_hung(
            'stopped while the data of this process hangs, so the last step cannot be saved. The '
            'stacks of all threads follow. Run the same command again to resume from the newest '
            'checkpoint.'
        )

    def _end(self, part: str, limit: float) -> None:
        self._announce()
        key, place = f'config.watchdog.{_PARTS[part][0]}', self._describe_place(part)
        end_hung(
            f'no progress for {limit:.0f} s: {place}. The stacks of all threads follow. The limit '
            f'is {key}. Run the same command again to resume from the newest checkpoint.'
        )


def end_hung_with(number: int) -> NoReturn:
    """Ends this process because another one makes no progress."""
    end_hung(
        f'process {number} makes no progress, and this one cannot continue without it. The stacks '
        'of all threads follow; the log of that process says where it hangs.'
    )


def end_hung(message: str) -> NoReturn:
    """Writes the stacks of all threads to the logs, and ends the process with exit code 76."""
    os.write(sys.stderr.fileno(), f'Error: {message}\n'.encode())
    logfile.dump_stacks(message)
    last_words.record('failed', message)
    _exit(EXIT_HUNG)


def _exit(code: int) -> NoReturn:
    # The main thread hangs, so the interpreter could not end normally.
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            output.flush()
    os._exit(code)


@dataclasses.dataclass
class _Idle:
    """How long nothing has changed.

    Attributes:
        secs: seconds since the last change.
        longest: the longest time between two changes while steps run.
        is_news: whether nobody has been told yet.
    """

    secs: float = 0.0
    longest: float = 0.0
    is_news: bool = True
    _seen: Any = None
    _tick: float | None = None

    def update(self, seen: Any, in_steps: bool) -> None:
        now = time.monotonic()
        self.secs += min(now - (self._tick or now), _MOST_TICK_SECS)
        self._tick = now
        if seen == self._seen:
            return
        if in_steps and self._seen is not None and seen[0] == self._seen[0]:
            self.longest = max(self.longest, self.secs)
        self.secs, self._seen, self.is_news = 0.0, seen, True
