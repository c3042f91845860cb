# SPDX-License-Identifier: Apache-2.0
"""A group of processes with one output, whose signals and failures are handled together."""

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

# A process that leads the process group of the others. When the launcher ends, even by SIGKILL, the
# pipe on the guard's standard input is closed. Then it kills all that is left of the group.
_GUARD = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.write(1, b'.')
os.read(0, 1)
os.killpg(0, signal.SIGKILL)
"""

# A run saves at SIGUSR1 and prints its stacks at SIGUSR2, and continues. Until it can, at the start
# of Python, they would end it.
_CONTINUING = (signal.SIGUSR1, signal.SIGUSR2)

# ('exit', process, code), ('signal', 0, number), or ('late', group, 0) after the grace period.
Events = queue.SimpleQueue[tuple[str, int, int]]


class Group:
    """The processes of one attempt.

    Attributes:
        processes: running processes by their number in the group.
        failed: number and exit code of the process that failed first, or None.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environments: Sequence[Mapping[str, str]],
        events: Events,
    ) -> None:
        """Starts one process for each command.

        Args:
            commands: the command of each process.
            environments: the environment of each process.
            events: receives `('exit', number, code)` when a process ends.
        """
        self._events = events
        # So that lines of several processes do not mix.
        self._output = threading.Lock()
        self._guard = subprocess.Popen(
            [sys.executable, '-I', '-S', '-c', _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
        )
        assert self._guard.stdout is not None
        # Wait until it ignores signals, because those to the group would end it, too.
        self._guard.stdout.read(1)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.failed: tuple[int, int] | None = None
        self._readers: list[threading.Thread] = []
        # Also for KeyboardInterrupt: processes that have started must not outlive the launcher.
        try:
            with _ignore(*_CONTINUING):
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
            self._readers.append(_background(self._forward_output, number, pipe, descriptor))
        _background(lambda: self._events.put(('exit', number, process.wait())))

    def _forward_output(self, number: int, pipe: IO[bytes], descriptor: int) -> None:
        for line in pipe:
            # The last line may have no newline.
            complete = line if line.endswith(b'\n') else line + b'\n'
            with self._output:
                _write(descriptor, f'[{number}] '.encode() + complete)

    def send(self, number: int) -> None:
        """Sends a signal to each process that still runs."""
        for process in self.processes:
            process.send_signal(number)

    def wait(self, stop: Stop, grace_secs: float) -> int:
        """Waits for all processes, and returns the exit code of the one that failed first.

        Args:
            stop: the signals that the launcher has received, which are forwarded.
            grace_secs: seconds after the first failure until the others are killed.
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
                        self._terminate_others(stop)
                        timer.start()
            elif kind == 'signal':
                self.send(stop.signal_to_send(value))
            # The timer of an earlier group may have put its event into the same queue.
            elif number == self._guard.pid:
                report(f'killing {running} still running after {grace_secs:g} s')
                self.send(signal.SIGKILL)
        timer.cancel()
        return self.failed[1] if self.failed else 0

    def _terminate_others(self, stop: Stop) -> None:
        assert self.failed is not None
        if stop.signal is not None:
            return  # The signal was forwarded to all of them.
        number, code = self.failed
        reason = f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'
        report(f'process {number}: {reason}; terminating the others')
        self.send(signal.SIGTERM)

    def close(self) -> None:
        """Kills the rest of the group, such as children that a process has left running."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()
        # With a timeout, because a child in another process group may keep the pipe open.
        for reader in self._readers:
            reader.join(timeout=5)


class Stop:
    """The signals that the launcher has received.

    Attributes:
        signal: the first signal that asks for an end, or None.
    """

    def __init__(self, events: Events) -> None:
        self.signal: int | None = None
        self._events = events
        self._forwarded = False

    def signal_to_send(self, number: int) -> int:
        """Returns the signal to send to the processes for one that the launcher has received.

        The first one is forwarded. Later ones are dropped (0 is no signal), except that a second
        Ctrl-C becomes SIGKILL.
        """
        # They ask for a save and for the stacks of the threads, and end nothing.
        if number in _CONTINUING:
            return number
        if self._forwarded:
            return signal.SIGKILL if number == signal.SIGINT else 0
        self._forwarded = True
        # A closed terminal: the trainer saves at SIGTERM, but SIGHUP would just end it.
        return signal.SIGTERM if number == signal.SIGHUP else number

    @contextlib.contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Turns signals into events inside the `with` block."""
        numbers = [signal.SIGINT, signal.SIGTERM, *_CONTINUING]
        # Under nohup it is ignored, and must stay so.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number not in _CONTINUING:
            self.signal = self.signal or number
        self._events.put(('signal', 0, number))


@contextlib.contextmanager
def _ignore(*numbers: int) -> Iterator[None]:
    """Ignores signals; processes that are started in the `with` block inherit this."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _background(function: Callable[..., None], *args: Any) -> threading.Thread:
    # A daemon thread, so that one that still reads a pipe does not keep the launcher alive.
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def _write(descriptor: int, data: bytes) -> None:
    # If the reader of the output is gone, the processes must still be able to save.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]


def report(text: str) -> None:
    """Writes a line of the launcher itself to standard error."""
    _write(2, f'launch: {text}\n'.encode())
