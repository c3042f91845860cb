# SPDX-License-Identifier: Apache-2.0
"""Log files of a run: the screen output in `log.txt`, library messages in `debug.log`."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from etils import epath

from trainer.config import traces
from trainer.config.errors import full_text
from trainer.observe.progress import CLEAR

_SCREEN = 'trainer.screen'
_TIME = '%Y-%m-%d %H:%M:%S'


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


def route(directory: epath.PathLike | None, process: int = 0) -> None:
    """Sends the log of a run to files.

    `log.txt` gets the screen output, with our own warnings and the error that ends the run;
    `debug.log` all Python logging and warnings. Our own warnings are also printed.

    Args:
        directory: the run's directory, or None for no files.
        process: index of this process; those after the first write `log.<i>.txt`, `debug.<i>.log`.
    """
    loggers = {name: logging.getLogger(name) for name in ('', 'trainer', _SCREEN)}
    for logger in loggers.values():
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(logging.INFO)
    root, ours, screen = loggers.values()
    ours.addHandler(_to_screen())
    if directory is not None:
        path, number = epath.Path(directory), f'.{process}' if process else ''
        path.mkdir(parents=True, exist_ok=True)
        log = _open(path / f'log{number}.txt', _Lines(datefmt=_TIME))
        ours.addHandler(log)
        screen.addHandler(log)
        debug = logging.Formatter('%(asctime)s %(levelname)s %(name)s: %(message)s')
        root.addHandler(_open(path / f'debug{number}.log', debug))
    else:
        root.addHandler(logging.NullHandler())
    screen.propagate = False
    # absl installs a handler of its own that writes to the screen.
    logging.getLogger('absl').handlers.clear()
    logging.getLogger('absl').propagate = True
    logging.captureWarnings(True)
    sys.unraisablehook = _log_unraisable
    warnings.simplefilter('default')


def record(text: str) -> None:
    """Writes to `log.txt` text that was printed elsewhere."""
    logging.getLogger(_SCREEN).info(text)


def record_error(error: BaseException) -> None:
    """Writes what ended a run: to `log.txt` as on the screen, to `debug.log` with all frames."""
    if hasattr(error, 'exit_code'):  # Its text says all.
        record(f'Error: {full_text(error)}')
    else:
        record(f'The run has failed:\n{traces.shorten(error, elsewhere=other_frames())}')
    logging.getLogger().error('the run has failed', exc_info=error)


def other_frames() -> str:
    """Returns where the frames of a traceback are that the screen does not show."""
    files = [h.baseFilename for h in logging.getLogger().handlers if isinstance(h, _File)]
    return f'see {files[0]}' if files else traces.SHOWN


class _Lines(logging.Formatter):
    """Screen output with a timestamp on each line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        kind = 'Warning: ' if record.levelno == logging.WARNING else ''
        lines = f'{kind}{record.message}'.split('\n')
        return '\n'.join(f'{record.asctime} {line}'.rstrip() for line in lines)

    def usesTime(self) -> bool:
        return True


class _File(logging.FileHandler):
    """A log file that warns once and is then ignored if it cannot be written."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            self._failed = True
            _say_lost(self.baseFilename, sys.exc_info()[1])


def _open(path: epath.Path, formatter: logging.Formatter) -> logging.Handler:
    try:
        handler: logging.Handler = _File(os.fspath(path), encoding='utf-8')
    except OSError as error:
        _say_lost(os.fspath(path), error)
        return logging.NullHandler()
    handler.setFormatter(formatter)
    return handler


def _say_lost(path: str, error: BaseException | None) -> None:
    print(f'Warning: {path} cannot be written ({error}); continuing without it', file=sys.stderr)


def _to_screen() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    # On a terminal the live line may stand where the warning is to go.
    clear = CLEAR if sys.stderr.isatty() else ''
    handler.setFormatter(logging.Formatter(f'{clear}Warning: %(message)s'))
    return handler


def _log_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # TensorStore calls back into a closed event loop after a file could not be read or written.
    error = unraisable.exc_value or unraisable.exc_type()
    logging.getLogger().error('ignored in %r', unraisable.object, exc_info=error)
