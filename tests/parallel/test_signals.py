# SPDX-License-Identifier: Apache-2.0
"""The handlers of signals: installed, taken off, and those of others left alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from trainer import main
from trainer.parallel import signals
from trainer.parallel.signals import StopRequest

NUMBERS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_what_was_installed_is_taken_off() -> None:
    signals.install()
    signals.uninstall()
    assert [signal.getsignal(number) for number in NUMBERS] == [signal.SIG_DFL] * 2


def test_the_handlers_of_a_program_that_calls_main_stay() -> None:
    def mine(*_: Any) -> None: ...

    for number in NUMBERS:
        signal.signal(number, mine)
    argv = ['main', '--config=configs/mnist.py', '--mode=config']
    assert main.main(argv, StopRequest()) == 0
    assert [signal.getsignal(number) for number in NUMBERS] == [mine] * 2
