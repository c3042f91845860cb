# SPDX-License-Identifier: Apache-2.0
"""Signal handlers are installed and removed; those of other code stay."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from trainer import main
from trainer.parallel import last_words, signals
from trainer.parallel.signals import StopRequest

NUMBERS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def restored_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_uninstall() -> None:
    signals.install()
    signals.uninstall()
    assert [signal.getsignal(number) for number in NUMBERS] == [signal.SIG_DFL] * 2


def test_handlers_of_the_calling_program_stay() -> None:
    def mine(*_: Any) -> None: ...

    for number in NUMBERS:
        signal.signal(number, mine)
    argv = ['main', '--config=configs/mnist.py', '--mode=config']
    assert main.main(argv, StopRequest()) == 0
    assert [signal.getsignal(number) for number in NUMBERS] == [mine] * 2


def test_a_second_ctrl_c_leaves_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []
    codes: list[int] = []
    monkeypatch.setattr('os._exit', codes.append)
    request = StopRequest()
    with last_words.register(lambda *words: said.append(words)):
        request.handle(signal.SIGINT, None)
        assert (said, codes) == ([], [])
        request.handle(signal.SIGINT, None)
    assert [status for status, _ in said] == ['interrupted']
    assert codes == [signals.EXIT_INTERRUPTED]


def test_slow_or_failing_last_words_delay_nothing() -> None:
    said, forever = [], threading.Event()

    def fail(status: str, message: str) -> None:
        said.append(message)
        raise OSError(message)

    began = time.monotonic()
    with (
        last_words.register(fail),
        last_words.register(lambda *_: forever.wait(60) and None),
    ):
        last_words.record('failed', 'why')
    assert time.monotonic() - began < 10
    assert said == ['why']
    forever.set()
    with pytest.raises(ValueError), last_words.register(fail, stay=True):
        raise ValueError
    last_words.record('failed', 'of another process')
    assert said == ['why', 'of another process']
    last_words._recorders.clear()


def test_the_first_interrupt_requests_a_stop_and_the_second_raises() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request = StopRequest()
    with signals.handle_interrupts(request):
        assert not request.poll()
        signal.raise_signal(signal.SIGINT)
        assert request.poll()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        # From here on as before the block, should there be more of them.
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize('error', [None, ValueError, SystemExit, KeyboardInterrupt])
def test_the_handler_is_restored_after_the_block(error: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(BaseException), signals.handle_interrupts(StopRequest()):
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        if error is not None:
            raise error
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_custom_handler_stays() -> None:
    def mine(*_: Any) -> None: ...

    for handler in (mine, signal.SIG_IGN, signal.SIG_DFL):
        signal.signal(signal.SIGINT, handler)
        with signals.handle_interrupts(StopRequest()):
            assert signal.getsignal(signal.SIGINT) == handler
    # And one that was installed inside the block stays as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with signals.handle_interrupts(StopRequest()):
        signal.signal(signal.SIGINT, mine)
    assert signal.getsignal(signal.SIGINT) is mine
