# SPDX-License-Identifier: Apache-2.0
"""The log files of a run: printed output in `log.txt`, library messages in `debug.log`."""

from __future__ import annotations

import faulthandler
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
    # Level 3 (fatal), not 2 (errors): with a persistent compilation cache, XLA logs a harmless
    # "error" on machine features at each load.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    os.environ.setdefault('GRPC_VERBOSITY', 'ERROR')


def quiet_absl() -> None:
    """Removes absl's own handler, which prints, until `route` sends its lines to a file."""
    absl = logging.getLogger('absl')
    # At import absl adds a handler that prints to standard error.
    absl.handlers.clear()
    absl.propagate = False


def keep_stdout_for_python() -> None:
    """Discards what C++ libraries print to standard output, but not what Python prints.

    Python's stdout moves to a new descriptor, and descriptor 1 is redirected to /dev/null. Gloo
    prints a line there for every process of every group.
    """
    # What is in the buffer belongs to the old descriptor.
    sys.stdout.flush()
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    line_buffering = getattr(sys.stdout, 'line_buffering', False)
    sys.stdout = open(  # noqa: SIM115
        os.dup(1), 'w', encoding=encoding, errors=errors, buffering=1 if line_buffering else -1
    )
    devnull = os.open(os.devnull, os.O_WRONLY)
    # Below Python: C++ writes to descriptor 1, whatever `sys.stdout` is.
    os.dup2(devnull, 1)
    os.close(devnull)


def route(directory: epath.PathLike | None, process: int = 0) -> None:
    """Sends the log of a run to files.

    `log.txt` gets the printed output, the trainer's warnings and the error that ends the run;
    `debug.log` gets all Python logging and warnings. The trainer's warnings are also printed.

    Args:
        directory: the work directory, or None for no files.
        process: index of this process; processes other than 0 write `log.<i>.txt` and
            `debug.<i>.log`.
    """
    loggers = {name: logging.getLogger(name) for name in ('', 'trainer', _SCREEN)}
    # Handlers of an earlier call in this process would write to the files of its run.
    for logger in loggers.values():
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(logging.INFO)
    root, ours, screen = loggers.values()
    ours.addHandler(_screen_handler())
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
    # It has the handler of `log.txt` itself: its parents would write and print each line again.
    screen.propagate = False
    # absl installs a handler of its own that prints.
    logging.getLogger('absl').handlers.clear()
    logging.getLogger('absl').propagate = True
    logging.captureWarnings(True)
    sys.unraisablehook = _log_unraisable
    # `debug.log` is for developers: by default Python hides deprecations, and here they cost
    # nothing.
    warnings.simplefilter('default')


def record(text: str) -> None:
    """Writes text that was printed elsewhere to `log.txt`."""
    logging.getLogger(_SCREEN).info(text)


def record_error(error: BaseException) -> None:
    """Writes the error that ended a run: to `log.txt` as printed, to `debug.log` in full."""
    if hasattr(error, 'exit_code'):  # An expected error, whose message suffices.
        record(f'Error: {full_text(error)}')
    else:
        text = traces.format_traceback(error, elsewhere=full_traceback_location())
        record(f'The run has failed:\n{text}')
    # To the root, which only `debug.log` listens to.
    logging.getLogger().error('the run has failed', exc_info=error)


def dump_stacks(message: str) -> None:
    """Writes a message and the Python stacks of all threads to standard error and to `log.txt`."""
    record(f'Error: {message}')
    faulthandler.dump_traceback(all_threads=True)
    for handler in logging.getLogger(_SCREEN).handlers:
        if isinstance(handler, _File) and handler.stream is not None:
            # In C, to the descriptor: a thread that hangs may hold a lock of Python's file.
            faulthandler.dump_traceback(handler.stream.fileno(), all_threads=True)


def full_traceback_location() -> str:
    """Returns where to find the frames that the printed traceback leaves out."""
    files = [h.baseFilename for h in logging.getLogger().handlers if isinstance(h, _File)]
    return f'see {files[0]}' if files else traces.HOW_TO_SEE_ALL


class _Lines(logging.Formatter):
    """Formats printed output with a timestamp on each line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        kind = 'Warning: ' if record.levelno == logging.WARNING else ''
        lines = f'{kind}{record.message}'.split('\n')
        return '\n'.join(f'{record.asctime} {line}'.rstrip() for line in lines)

    def usesTime(self) -> bool:
        return True


class _File(logging.FileHandler):
    """A log file that warns once if it cannot be written; the run continues without it."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        # A full disk would otherwise print a warning for every line.
        if not self._failed:
            self._failed = True
            _warn_unwritable(self.baseFilename, sys.exc_info()[1])


def _open(path: epath.Path, formatter: logging.Formatter) -> logging.Handler:
    try:
        handler: logging.Handler = _File(os.fspath(path), encoding='utf-8')
    except OSError as error:
        _warn_unwritable(os.fspath(path), error)
        return logging.NullHandler()
    handler.setFormatter(formatter)
    return handler


def _warn_unwritable(path: str, error: BaseException | None) -> None:
    print(f'Warning: {path} cannot be written ({error}); continuing without it', file=sys.stderr)


def _screen_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    # On a terminal, the cursor may be at the end of the progress line: overwrite that.
    clear = CLEAR if sys.stderr.isatty() else ''
    handler.setFormatter(logging.Formatter(f'{clear}Warning: %(message)s'))
    return handler


def _log_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # Not printed: after a failed read or write, TensorStore calls back into an event loop that is
    # already closed.
    error = unraisable.exc_value or unraisable.exc_type()
    logging.getLogger().error('ignored in %r', unraisable.object, exc_info=error)
