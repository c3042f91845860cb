# SPDX-License-Identifier: Apache-2.0
"""Signal handlers: SIGTERM and Ctrl-C request a stop after the current step, with a save.

Before the first step there is nothing to save, and they end the process at once. On SIGUSR1 a
run saves and continues; on SIGUSR2 a process prints its stacks and continues.

The command line imports this module before all others, so it uses only a little of the standard
library.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from trainer.parallel import last_words
from trainer.parallel.save_request import SaveRequest

EXIT_INTERRUPTED = 130
EXIT_PREEMPTED = 42


class StopRequest:
    """A stop request that a signal handler sets and the training loop polls.

    Attributes:
        signal: the number of the first signal that arrived, or None.
        shared: whether several processes must stop at the same poll.
        save: the request to save and to continue.
        starting: whether there is nothing to save yet, so that a signal ends the process at once.
        all_failed: whether all processes fail at the same step, so that none waits for another in a
            collective.
    """

    def __init__(self, signal: int | None = None, *, starting: bool = False):
        """Creates a request; `signal` is None unless a stop is already requested."""
        self.signal = signal
        self.save = SaveRequest()
        self.shared = False
        self.starting = starting
        self.all_failed = False
        self._polls = 0
        self._agreed = False

    def poll(self) -> bool:
        """Returns whether to stop now; all processes must poll equally often.

        With several processes, JAX's own handler receives SIGTERM in whichever process it arrives,
        and JAX's preemption sync manager chooses a poll that none of them has passed yet.
        """
        if not self.shared:
            return self.signal is not None
        if not self._agreed:
            from jax.experimental import multihost_utils

            self._polls += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._polls)
            if self._agreed and self.signal is None:
                self.signal = signal.SIGTERM
        return self._agreed

    def ask(self) -> bool:
        """Asks all processes to stop after the same step; returns whether there are several."""
        if self.shared:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.shared

    def share(self) -> None:
        """Makes all processes stop together; `jax.distributed` must be initialized."""
        import jax

        from trainer import compat

        self.shared = True
        self.starting = False
        client = compat.coordination_client()
        self.save.share(client, jax.process_index(), jax.process_count())
        if self.signal is not None:  # It arrived before JAX could notify the other processes.
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def exit_code(self) -> int:
        """The exit code of a run that ended by this request with its state saved."""
        return EXIT_PREEMPTED if self.signal == signal.SIGTERM else EXIT_INTERRUPTED

    @property
    def status(self) -> str | None:
        """The status of a run that ended by this request, None if it has not been made."""
        if self.signal is None:
            return None
        return 'interrupted' if self.signal == signal.SIGINT else 'preempted'

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Requests a stop; a second Ctrl-C exits at once, with the last committed save intact."""
        if self.starting:
            _exit_at_once(number)
        if self.signal is not None and number == signal.SIGINT:
            _write_stderr('\nStopped at once, without saving.\n')
            last_words.record('interrupted', 'Ctrl-C twice: stopped at once, without saving')
            os._exit(EXIT_INTERRUPTED)
        if self.signal is None:
            self.signal = number
            name = signal.Signals(number).name
            hint = '; Ctrl-C again to stop at once' if number == signal.SIGINT else ''
            _write_stderr(f'\n{name}: saving after this step{hint}.\n')
            if self.shared and number == signal.SIGINT:
                os.kill(os.getpid(), signal.SIGTERM)  # For JAX, which notifies the others.


def _exit_at_once(number: int) -> None:
    name = signal.Signals(number).name
    _write_stderr(f'\n{name}: stopped before the first step; nothing is lost.\n')
    status = 'preempted' if number == signal.SIGTERM else 'interrupted'
    last_words.record(status, f'{name} before the first step')
    # Not an exception: it would be raised in the middle of an import, and the process would still
    # wait for the threads that compile.
    with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
        sys.stdout.flush()
    os._exit(EXIT_PREEMPTED if number == signal.SIGTERM else EXIT_INTERRUPTED)


def _write_stderr(text: str) -> None:
    # `os.write`, not `print`: a handler may run in the middle of another print. Errors are ignored,
    # because a closed stderr must not prevent the save.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), text.encode())


def enable_stack_dumps() -> None:
    """Writes the Python stacks of all threads at each SIGUSR2, and when native code crashes."""
    # faulthandler works in C, so also while the interpreter waits in a collective that hangs.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)


def install() -> StopRequest:
    """Installs the handlers of a single-process run; the caller must be the main thread.

    Returns:
        The request, which is `starting` until the caller changes that.
    """
    request = StopRequest(starting=True)
    signal.signal(signal.SIGTERM, request.handle)
    signal.signal(signal.SIGINT, request.handle)
    signal.signal(signal.SIGUSR1, request.save.handle)
    return request


@contextlib.contextmanager
def handle_interrupts(request: StopRequest) -> Iterator[None]:
    """Makes Ctrl-C inside the block request a stop instead of raising KeyboardInterrupt.

    That exception could be raised in the middle of a step or a save, and lose the state. A second
    Ctrl-C does raise it. The previous handler is restored after the block. Does nothing if the
    program has its own handler, outside of the main thread, and with several processes.

    Args:
        request: receives the signal.
    """
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            # Restored here too: a further Ctrl-C may follow before the block ends.
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt
        request.signal = number
        _write_stderr('\nStopping after this step; interrupt again to stop at once.\n')

    in_main_thread = threading.current_thread() is threading.main_thread()
    if before is not signal.default_int_handler or not in_main_thread or _has_several_processes():
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is handle:
            signal.signal(signal.SIGINT, before)


def _has_several_processes() -> bool:
    import jax

    return jax.process_count() > 1


def is_training_command(argv: Sequence[str]) -> bool:
    """Whether a command line trains, judged before its flags can be parsed."""
    modes = ['train']
    for word, following in zip(argv, [*argv[1:], ''], strict=True):
        name, equals, value = word.lstrip('-').partition('=')
        if word.startswith('-') and name == 'mode':
            modes.append(value if equals else following)
    return modes[-1] == 'train'


def uninstall() -> None:
    """Restores the default effect of signals, for modes that save nothing.

    SIGUSR1 is ignored then: whoever sends it to save does not want to end the process. Handlers of
    other code stay, because `main` may be called from Python.
    """
    if getattr(signal.getsignal(signal.SIGUSR1), '__func__', None) is SaveRequest.handle:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(number)
        ours = getattr(handler, '__func__', None) is StopRequest.handle
        if ours or handler is None:  # None is a handler of JAX, in C.
            signal.signal(number, signal.SIG_DFL)
