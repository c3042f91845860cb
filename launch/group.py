# SPDX-License-Identifier: Apache-2.0
"""Several processes that start, write, stop and end as one."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, Any

# Leads the process group of the others, and kills whatever is left of it when the launcher is gone,
# however it went: only then does the pipe on its input end.
_GUARD = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.write(1, b'.')
os.read(0, 1)
os.killpg(0, signal.SIGKILL)
"""

# ('exit', process, code), ('signal', 0, number), or ('late', group, 0) when the grace is over.
Events = queue.SimpleQueue[tuple[str, int, int]]


class Group:
    """The processes of one attempt, from their start to the end of the last one.

    Attributes:
        processes: by number.
        failed: number and exit code of the process that failed first, or None.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environments: Sequence[Mapping[str, str]],
        events: Events,
    ) -> None:
        """Starts one process for each command; `('exit', number, code)` goes to `events`."""
        self._events = events
        self._output = threading.Lock()
        self._guard = subprocess.Popen(
            [sys.executable, '-I', '-S', '-c', _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
        )
        assert self._guard.stdout is not None
        self._guard.stdout.read(1)  # From here on it does not die of a signal to the group.
        self.processes: list[subprocess.Popen[bytes]] = []
        self.failed: tuple[int, int] | None = None
        self._readers: list[threading.Thread] = []
        try:
            for command, environment in zip(commands, environments, strict=True):
                self._start(command, environment)
        except BaseException:
            self.close()
            raise

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=self._guard.pid,
        )
        number = len(self.processes)
        self.processes.append(process)
        for pipe, descriptor in ((process.stdout, 1), (process.stderr, 2)):
            self._readers.append(_background(self._pass_on, number, pipe, descriptor))
        _background(lambda: self._events.put(('exit', number, process.wait())))

    def _pass_on(self, number: int, pipe: IO[bytes], descriptor: int) -> None:
        for line in pipe:
            ended = line if line.endswith(b'\n') else line + b'\n'
            with self._output:
                _write(descriptor, f'[{number}] '.encode() + ended)

    def send(self, number: int) -> None:
        """Sends a signal to each process that still runs."""
        for process in self.processes:
            process.send_signal(number)

    def wait(self, stop: Stop, grace_secs: float) -> int:
        """Waits until all have ended, and returns the exit code of the one that failed first.

        Args:
            stop: the signals that the launcher has got; they are passed on.
            grace_secs: the others have so long to end by themselves once one has failed.
        """
        running = len(self.processes)
        timer = threading.Timer(grace_secs, self._events.put, [('late', self._guard.pid, 0)])
        timer.daemon = True
        while running:
            kind, number, value = self._events.get()
            if kind == 'exit':
                running -= 1
                if value and self.failed is None:
                    self.failed = (number, value)
                    if running:
                        self._end_others(stop)
                        timer.start()
            elif kind == 'signal':
                self.send(stop.take(value))
            elif number == self._guard.pid:
                say(f'{running} still running {grace_secs:g} s later: killed')
                self.send(signal.SIGKILL)
        timer.cancel()
        return self.failed[1] if self.failed else 0

    def _end_others(self, stop: Stop) -> None:
        assert self.failed is not None
        if stop.signal is not None:
            return  # They know already.
        number, code = self.failed
        ended = f'ended by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'
        say(f'process {number}: {ended}; ending the others')
        self.send(signal.SIGTERM)

    def close(self) -> None:
        """Kills what is left of the group: what a process has started and not ended."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()
        for reader in self._readers:
            reader.join(timeout=5)


class Stop:
    """The wish to end that came from outside.

    Attributes:
        signal: the first signal that arrived, or None.
    """

    def __init__(self, events: Events) -> None:
        self.signal: int | None = None
        self._events = events
        self._passed_on = False

    def take(self, number: int) -> int:
        """Returns what to send: the first signal once, nothing again, SIGKILL for another Ctrl-C.

        A terminal that was closed is passed on as SIGTERM; SIGUSR1 ends nothing, and goes through.
        """
        if number == signal.SIGUSR1:
            return number
        if self._passed_on:
            return signal.SIGKILL if number == signal.SIGINT else 0
        self._passed_on = True
        return signal.SIGTERM if number == signal.SIGHUP else number

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turns signals into events while it lasts."""
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # As it is under nohup.
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1:
            self.signal = self.signal or number
        self._events.put(('signal', 0, number))


def _background(function: Callable[..., None], *args: Any) -> threading.Thread:
    # A daemon: one that reads from a process which left the group must not keep us.
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def _write(descriptor: int, data: bytes) -> None:
    # Whoever reads may be gone, which must not keep the processes from saving.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]


def say(text: str) -> None:
    """Writes a line of the launcher's own to the standard error output."""
    _write(2, f'launch: {text}\n'.encode())
