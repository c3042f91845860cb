# SPDX-License-Identifier: Apache-2.0
"""Keeps the libraries' chatter off the screen, in a file of the run."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from etils import epath

from trainer.observe.progress import CLEAR


def quiet_environment() -> None:
    """Silences XLA's C++ logs; must run before JAX is imported."""
    # Level 3 and not 2: with a persistent cache XLA logs a machine-feature "error" at each load.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    os.environ.setdefault('GRPC_VERBOSITY', 'ERROR')


def quiet_absl() -> None:
    """Takes absl's own handler off the screen, until `route` says where its lines go."""
    absl = logging.getLogger('absl')
    absl.handlers.clear()
    absl.propagate = False


def keep_stdout_for_python() -> None:
    """Moves Python's standard output off number 1, where C++ libraries print: that is dropped.

    Gloo greets every peer of every group of processes there.
    """
    sys.stdout.flush()
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    line_buffering = getattr(sys.stdout, 'line_buffering', False)
    sys.stdout = open(  # noqa: SIM115
        os.dup(1), 'w', encoding=encoding, errors=errors, buffering=1 if line_buffering else -1
    )
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def route(directory: epath.PathLike | None, name: str = 'log.txt') -> None:
    """Sends all Python logging and warnings to a file; our own warnings also go to the screen.

    Args:
        directory: the run's directory, or None for no file.
        name: of the file in it.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    if directory is None:
        root.addHandler(logging.NullHandler())
    else:
        path = epath.Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(os.fspath(path / name))
        to_file.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(name)s: %(message)s'))
        root.addHandler(to_file)
    # absl installs a handler of its own that writes to the screen.
    logging.getLogger('absl').handlers.clear()
    logging.getLogger('absl').propagate = True
    logging.captureWarnings(True)
    sys.unraisablehook = _log_unraisable
    warnings.simplefilter('default')
    to_screen = logging.StreamHandler(sys.stderr)
    to_screen.setLevel(logging.WARNING)
    # On a terminal the live line may stand where the warning is to go.
    clear = CLEAR if sys.stderr.isatty() else ''
    to_screen.setFormatter(logging.Formatter(f'{clear}Warning: %(message)s'))
    ours = logging.getLogger('trainer')
    ours.handlers[:] = [to_screen]


def _log_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # TensorStore calls back into a closed event loop after a file could not be read or written.
    error = unraisable.exc_value or unraisable.exc_type()
    logging.getLogger().error('ignored in %r', unraisable.object, exc_info=error)
