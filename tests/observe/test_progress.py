# SPDX-License-Identifier: Apache-2.0
"""One live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pathlib
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from tests import command
from trainer.observe.progress import Progress, duration

ROW = {
    'train/loss': 0.25,
    'train/accuracy': 0.5,
    'train/learning_rate': 0.01,
    'train/steps_per_sec': 4.0,
    'train/examples_per_sec': 1280.0,
}


class Terminal:
    """A terminal with a number of columns: `read` returns what is written to `output`."""

    def __init__(self, columns: int) -> None:
        self._leader, follower = os.openpty()
        size = struct.pack('HHHH', 40, columns, 0, 0)
        fcntl.ioctl(follower, termios.TIOCSWINSZ, size)
        self.output: TextIO = os.fdopen(follower, 'w')

    def read(self) -> str:
        """Returns what was written since the last time; the kernel may pass it on in pieces."""
        os.write(self.output.fileno(), b'\0')
        text = b''
        while not text.endswith(b'\0'):
            text += os.read(self._leader, 100_000)
        return text[:-1].decode()

    def close(self) -> None:
        self.output.close()
        os.close(self._leader)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv('TERM', 'xterm')
    made = Terminal(columns=120)
    yield made
    made.close()


def test_several_losses_are_shown_by_name() -> None:
    pipe = io.StringIO()
    Progress(1000, pipe).update(500, {'train/gen_loss': 0.5, 'train/disc_loss': 1.25})
    assert pipe.getvalue() == 'step 500/1,000 (50%)  gen_loss 0.5000  disc_loss 1.2500\n'


def test_a_pipe_gets_one_plain_line_for_each_row() -> None:
    pipe = io.StringIO()
    progress = Progress(1000, pipe)
    progress.message('begins')
    for step in range(1, 101):
        progress.tick(step)
    progress.update(100, ROW)
    progress.message('eval test: loss 1')
    assert pipe.getvalue() == (
        'begins\n'
        'step 100/1,000 (10%)  loss 0.2500  accuracy 0.5000  lr 0.01  1,280 examples/s'
        '  250 ms/step  ETA 3:45\n'
        'eval test: loss 1\n'
    )


def test_a_terminal_gets_one_line_that_is_rewritten(terminal: Terminal) -> None:
    progress = Progress(1000, terminal.output)
    progress.update(100, ROW)
    progress.tick(101)
    line = terminal.read()
    assert line.startswith('\r\x1b[Kstep 101/1,000 (10%)  loss 0.2500')
    assert '\n' not in line


def test_a_message_first_clears_the_live_line(terminal: Terminal) -> None:
    progress = Progress(10, terminal.output)
    progress.message('begins')
    assert terminal.read() == 'begins\r\n'
    progress.tick(1)
    assert terminal.read() == '\r\x1b[Kstep 1/10 (10%)'
    progress.message('saved')
    progress.message('ends')
    assert terminal.read() == '\r\x1b[Ksaved\r\nends\r\n'


def test_at_most_five_refreshes_a_second(terminal: Terminal) -> None:
    progress = Progress(1000, terminal.output)
    began = time.monotonic()
    for step in range(35):
        time.sleep(0.02)
        progress.update(step, {})
        progress.tick(step)
    secs = time.monotonic() - began
    assert 2 <= terminal.read().count('\r') <= 5 * secs + 1


@pytest.mark.parametrize('columns', [20, 50, 80, 100])
def test_a_narrow_terminal_shows_the_most_important_parts(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('TERM', 'xterm')
    terminal = Terminal(columns)
    progress = Progress(100_000, terminal.output)
    progress.update(50_000, ROW)
    progress.tick(50_000)
    line = terminal.read().removeprefix('\r\x1b[K')
    terminal.close()
    assert len(line) < columns
    assert line.startswith('step 50,000/100,000'[: columns - 1])
    assert ('ETA' in line) == (columns >= 50)
    assert ('ex/s' in line or 'examples/s' in line) == (columns >= 80)
    assert 'accuracy' not in line


def test_80_columns_fit_all_parts_but_the_accuracy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('TERM', 'xterm')
    terminal = Terminal(80)
    progress = Progress(18_750, terminal.output)
    progress.update(9_000, {**ROW, 'train/steps_per_sec': 140.0})
    progress.tick(9_000)
    line = terminal.read().removeprefix('\r\x1b[K')
    terminal.close()
    expected = ('9,000/18,750 (48%)', 'loss 0.2500', 'lr 0.01', '1,280 ex/s', '7.14 ms', 'ETA 1:10')
    assert all(part in line for part in expected), line


def test_a_dumb_terminal_gets_no_control_characters(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('TERM', 'dumb')
    progress = Progress(10, terminal.output)
    progress.tick(1)
    progress.message('ends')
    assert terminal.read() == 'ends\r\n'


def test_a_row_without_times_or_with_nan_is_shown() -> None:
    pipe = io.StringIO()
    progress = Progress(1000, pipe)
    progress.update(999, {'train/loss': float('nan'), 'train/steps_per_sec': float('nan')})
    assert pipe.getvalue() == 'step 999/1,000 (99%)  loss nan\n'


@pytest.mark.slow
def test_a_real_run_on_a_terminal(tmp_path: pathlib.Path) -> None:
    leader, follower = os.openpty()
    arguments = [command.MLP, *command.SMALL, f'--workdir={tmp_path}', '--config.train_for=60steps']
    process = subprocess.Popen(
        [sys.executable, '-m', 'trainer.main', *arguments, '--config.log.every=20steps'],
        cwd=command.ROOT,
        env={**os.environ, 'TERM': 'xterm', 'XLA_FLAGS': command.xla_flags()},
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    text = ''
    while True:
        try:
            text += os.read(leader, 100_000).decode()
        except OSError:  # the other side is closed
            break
    os.close(leader)
    assert process.wait() == 0, text
    # What is seen: of each line only what comes after its last clearing.
    seen = [line.rsplit('\r\x1b[K', 1)[-1] for line in text.split('\r\n')]
    assert '\r\x1b[Kstep 1/60 (1%)' in text
    assert not any(line.startswith('step ') for line in seen)
    assert any(re.match(r'eval test at step 60: loss [\d.]+ ', line) for line in seen)
    assert 'finished at step 60' in seen


@pytest.mark.slow
def test_a_run_continues_when_its_output_is_closed(tmp_path: pathlib.Path) -> None:
    """As with `| head -1`, with standard output alone or with standard error too."""
    for name, stderr in (('both', subprocess.STDOUT), ('one', subprocess.PIPE)):
        workdir = tmp_path / name
        arguments = [command.MLP, *command.SMALL, f'--workdir={workdir}']
        process = subprocess.Popen(
            [sys.executable, '-m', 'trainer.main', *arguments, '--config.train_for=300steps'],
            cwd=command.ROOT,
            env={**os.environ, 'XLA_FLAGS': command.xla_flags()},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith('parameter')
        process.stdout.close()
        err = process.stderr.read() if process.stderr else ''
        assert process.wait(timeout=120) == 0, err
        if process.stderr:
            process.stderr.close()
            assert re.fullmatch(r'Warning: standard output is closed \(.*\); .*\n', err)
        assert command.result(workdir)['status'] == 'finished'


@pytest.mark.parametrize(
    ('secs', 'text'),
    [
        (0, '0.0 s'),
        (59.94, '59.9 s'),
        (59.96, '1:00'),
        (61, '1:01'),
        (3599.6, '1:00:00'),
        (100_000, '27:46:40'),
    ],
)
def test_duration(secs: float, text: str) -> None:
    assert duration(secs) == text


def test_rows_and_messages_are_recorded_and_the_live_line_is_not(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, recorded = logging.getLogger('trainer.screen'), io.StringIO()
    monkeypatch.setattr(log, 'handlers', [logging.StreamHandler(recorded)])
    log.setLevel(logging.INFO)
    progress = Progress(1000, terminal.output)
    progress.update(100, ROW)
    for step in range(101, 110):
        progress.tick(step)
        time.sleep(0.03)
    progress.message('a message')
    log.setLevel(logging.NOTSET)
    row = 'step 100/1,000 (10%)  loss 0.2500  accuracy 0.5000  lr 0.01  1,280 examples/s'
    first, second = recorded.getvalue().splitlines()
    assert first.startswith(row)
    assert second == 'a message'
    assert terminal.read().count('step 10') > 1
