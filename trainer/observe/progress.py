# SPDX-License-Identifier: Apache-2.0
"""The printed progress of a run: a live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Mapping
from typing import TextIO

Screen = TextIO | io.TextIOBase

_log = logging.getLogger('trainer')
# Receives the printed output, without the live line: see `trainer.observe.logfile`.
_record = logging.getLogger('trainer.screen')
_record.propagate = False
_REFRESH_SECS = 0.2
_DEFAULT_COLUMNS = 80
_SPACE = '  '
# A line that is too long for the terminal is first abbreviated, then loses parts in this order.
_ABBREVIATIONS = (('accuracy', 'acc'), ('examples/s', 'ex/s'), ('s/step', 's'))
_DROPPED_FIRST = ('accuracy', 'step_time', 'learning_rate', 'examples')

# Moves the cursor to the first column and clears the line.
CLEAR = '\r\x1b[K'


class NullScreen(io.TextIOBase):
    """The output of a process that prints nothing."""

    def write(self, text: str) -> int:
        """Discards the text."""
        return len(text)


class Progress:
    """Prints step, percent, losses, learning rate, examples per second, step time and ETA."""

    def __init__(self, total_steps: int, output: Screen):
        """Prints nothing yet; the line is live if the output is a terminal.

        Args:
            total_steps: length of the run.
            output: where to write; control characters are sent only to a terminal that is not
                'dumb'.
        """
        self._total = total_steps
        self._output = output
        self._live = output.isatty() and os.environ.get('TERM') != 'dumb'
        self._row: Mapping[str, float] = {}
        self._last_refresh = 0.0
        self._open = False

    def tick(self, step: int) -> None:
        """Called after every step; refreshes the live line at most five times a second."""
        if not self._live:
            return
        now = time.monotonic()
        if now - self._last_refresh >= _REFRESH_SECS:
            self._last_refresh = now
            self._show(step)

    def update(self, step: int, row: Mapping[str, float]) -> None:
        """Sets a new row: on a terminal for the next live line, in a pipe printed at once."""
        self._row = row
        line = _SPACE.join(self._parts(step).values())
        _record.info(line)
        if not self._live:
            self._print(line)

    def message(self, text: str) -> None:
        """Prints text, in place of the live line if there is one."""
        # The log gets the text without control characters.
        _record.info(text)
        clear = CLEAR if self._open else ''
        self._open = False
        self._print(clear + text)

    def _show(self, step: int) -> None:
        # One column less than the width: some terminals wrap when the last column is written.
        width = self._columns() - 1
        parts = self._parts(step)
        if len(_SPACE.join(parts.values())) > width:
            parts = {name: _shorten(text) for name, text in parts.items()}
        for name in _DROPPED_FIRST:
            if len(_SPACE.join(parts.values())) > width:
                parts.pop(name, None)
        self._open = True
        self._write(CLEAR + _SPACE.join(parts.values())[:width])

    def _print(self, text: str) -> None:
        self._write(text + '\n')

    def _write(self, text: str) -> None:
        try:
            self._output.write(text)
            self._output.flush()
        except OSError as error:
            # As with `| head`. Not a reason to end the run: its rows are also in a file.
            self._live = self._open = False
            _redirect_to_devnull(self._output)
            _log.warning(
                'standard output is closed (%s); training continues, see metrics.jsonl', error
            )

    def _columns(self) -> int:
        try:
            columns = os.get_terminal_size(self._output.fileno()).columns
        except OSError:
            columns = 0
        # Some terminals, as in containers, report a width of 0.
        return columns or _DEFAULT_COLUMNS

    def _parts(self, step: int) -> dict[str, str]:
        # The order of the parts is that of the printed line.
        parts = {'step': f'step {step:,}/{self._total:,} ({100 * step // self._total}%)'}
        row = {name.removeprefix('train/'): value for name, value in self._row.items()}
        if 'loss' in row:
            parts['loss'] = f'loss {row["loss"]:.4f}'
        else:
            losses = {name: value for name, value in row.items() if name.endswith('_loss')}
            parts.update({name: f'{name} {value:.4f}' for name, value in losses.items()})
        if 'accuracy' in row:
            parts['accuracy'] = f'accuracy {row["accuracy"]:.4f}'
        if 'learning_rate' in row:
            parts['learning_rate'] = f'lr {row["learning_rate"]:.3g}'
        rate = row.get('steps_per_sec', 0.0)
        if rate > 0:
            parts['examples'] = f'{row["examples_per_sec"]:,.0f} examples/s'
            parts['step_time'] = _step_time(1 / rate)
            parts['eta'] = f'ETA {duration((self._total - step) / rate)}'
        return parts


def _step_time(secs: float) -> str:
    """Returns '7.25 ms/step' or '2.08 s/step'."""
    # Rounding must not lead to '1e+03 ms/step'.
    return f'{1e3 * secs:.3g} ms/step' if secs < 0.9995 else f'{secs:.3g} s/step'


def _shorten(text: str) -> str:
    for long, short in _ABBREVIATIONS:
        text = text.replace(long, short)
    return text


def duration(secs: float) -> str:
    """Returns '1:02:03', '2:03' or '4.5 s'."""
    if secs < 59.95:
        return f'{secs:.1f} s'
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def _redirect_to_devnull(output: Screen) -> None:
    """Discards what is written to an output from here on, and what it has buffered."""
    # Otherwise flushing the buffer at exit would fail, and change the exit code.
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, output.fileno())
    os.close(devnull)
