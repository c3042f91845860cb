# SPDX-License-Identifier: Apache-2.0
"""What the launchers share: their command lines, their errors, and the trainer's exit codes."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]

EXIT_MISTAKE = 2
EXIT_PREEMPTED = 42
EXIT_CORRUPT = 65
EXIT_INTERRUPTED = 130

# Where the processes of a run meet. JAX's own choice on TPUs is another one.
COORDINATOR_PORT = 8476


class Parser(argparse.ArgumentParser):
    """Flags are written `--like_this`; what follows `--` belongs to the trainer."""

    def __init__(self, description: str, **kwargs: Any) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2; the usage of a dozen flags would hide what is wrong."""
        print(f'Error: {message}. See {self.prog} --help.', file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the launcher's own arguments and the trainer's, which follow the first `--`."""
    words = list(argv)
    if '--' not in words:
        return words, []
    border = words.index('--')
    return words[:border], words[border + 1 :]


def check_trainer(parser: Parser, trainer: Sequence[str]) -> None:
    """Ends with exit code 2 unless these arguments of the trainer name a config."""
    if not any(word == '--config' or word.startswith('--config=') for word in trainer):
        parser.error("the trainer's arguments come after `--`, as in: -- --config=configs/mnist.py")


def flag(arguments: Sequence[str], name: str) -> str | None:
    """Returns the value of `--name=value` or `--name value`, the last one given, or None."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], ''], strict=True):
        if word == f'--{name}':
            found = following
        elif word.startswith(f'--{name}='):
            found = word.partition('=')[2]
    return found


def at_least(smallest: int) -> Callable[[str], int]:
    """Returns a type of flag: a whole number that is not smaller."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(
                f'expected a whole number of at least {smallest}, got {text!r}'
            )
        return value

    return number


def python() -> str:
    """Returns the Python that has the trainer's libraries: this one, or that of `.venv`."""
    made = ROOT / '.venv' / 'bin' / 'python'
    if importlib.util.find_spec('jax') is None and made.exists():
        return str(made)
    return sys.executable


def shown(words: Sequence[str]) -> str:
    """Returns the command as one would type it."""
    return ' '.join(shlex.quote(word) for word in words)
