# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the launchers: command lines, errors, and the exit codes of the trainer.

Launchers import nothing but the standard library, so that they run without JAX: on a login node,
or on the machine of the user.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The exit codes of the trainer, whose package cannot be imported without JAX.
EXIT_MISTAKE = 2
EXIT_PREEMPTED = 42
EXIT_CORRUPT = 65
EXIT_INTERRUPTED = 130

# The port of the coordinator of a run, other than the one that JAX chooses on TPUs by itself.
COORDINATOR_PORT = 8476


class Parser(argparse.ArgumentParser):
    """A parser of flags that are written `--like_this`; arguments after `--` are the trainer's."""

    def __init__(self, description: str, **kwargs: Any) -> None:
        super().__init__(
            description=description,
            # The descriptions contain commands, whose lines must not be rewrapped.
            formatter_class=argparse.RawDescriptionHelpFormatter,
            # With abbreviations, a misspelled flag could set another one.
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        """Prints an error and ends with exit code 2."""
        # Without the usage: a dozen flags would hide the error.
        print(f'Error: {message}. See {self.prog} --help.', file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the launcher's arguments, and the trainer's, which follow the first `--`."""
    words = list(argv)
    if '--' not in words:
        return words, []
    separator = words.index('--')
    return words[:separator], words[separator + 1 :]


def check_trainer(parser: Parser, trainer: Sequence[str]) -> None:
    """Checks that the trainer's arguments name a config; otherwise ends with exit code 2."""
    if not any(word == '--config' or word.startswith('--config=') for word in trainer):
        parser.error("the trainer's arguments come after `--`, as in: -- --config=configs/mnist.py")


def flag_value(arguments: Sequence[str], name: str) -> str | None:
    """Returns the value of `--name=value` or `--name value`; None if the flag is not given."""
    last = None
    # The last one counts, as in the trainer.
    for word, following in zip(arguments, [*arguments[1:], ''], strict=True):
        if word == f'--{name}':
            last = following
        elif word.startswith(f'--{name}='):
            last = word.partition('=')[2]
    return last


def int_at_least(minimum: int) -> Callable[[str], int]:
    """Returns a flag type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        # Text that is not an integer gets the same message as an integer that is too small.
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f'expected an integer of at least {minimum}, got {text!r}'
            )
        return value

    return parse


def find_python() -> str:
    """Returns the Python that has the trainer's libraries: this one, or that of `.venv`."""
    installed = ROOT / '.venv' / 'bin' / 'python'
    # Looked up and not imported, which would take seconds.
    if importlib.util.find_spec('jax') is None and installed.exists():
        return str(installed)
    return sys.executable


def quote_command(words: Sequence[str]) -> str:
    """Returns a command as one would type it in a shell."""
    return ' '.join(shlex.quote(word) for word in words)
