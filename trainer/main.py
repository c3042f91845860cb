# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m trainer.main --config=configs/mnist.py [--config.key=value ...]`."""

from __future__ import annotations

import sys

if __name__ == '__main__':
    # Before the other imports: they take seconds, and a signal may arrive meanwhile.
    from trainer.observe import stdio
    from trainer.parallel import signals

    STOP = signals.install()
    if not signals.is_training_command(sys.argv):
        signals.uninstall()
    # Before any file or socket is opened: it would get the descriptor of a closed output.
    stdio.open_closed_stdio()
    signals.enable_stack_dumps()

import contextlib
import os
import threading
import time
from collections.abc import Sequence

from trainer.checkpoint.errors import SaveError
from trainer.config import identity, loading, overrides, places, schema, show, traces
from trainer.config.errors import UserError, full_text
from trainer.modes import flags
from trainer.modes.flags import FLAGS
from trainer.observe import logfile
from trainer.parallel import signals

# How long a process whose save has failed waits for its other threads.
_GRACE_SECS = 5.0


def main(argv: Sequence[str], stop: signals.StopRequest) -> int:
    """Runs the command line and returns the exit code.

    Args:
        argv: program name and arguments.
        stop: set by a signal handler when the run is to end.
    """
    try:
        code = _run(argv, stop)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f'Error: {full_text(error)}', file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Any other pipe, such as one of a data worker, is an error of its own.
        if not _is_reader_gone():
            raise
        return 1


def _run(argv: Sequence[str], stop: signals.StopRequest) -> int:
    # absl would reject --config.KEY=VALUE, whose flags are not known in advance.
    spec, assignments, rest = overrides.parse_argv(list(argv[1:]))
    flags.parse([argv[0], *rest], has_config=spec is not None)
    if FLAGS.mode != 'train':
        signals.uninstall()
    if spec is None and (FLAGS.help or FLAGS.helpconfig):
        parts = [_usage()] if FLAGS.help else []
        print('\n'.join([*parts, show.format_all_keys()] if FLAGS.helpconfig else parts))
        return 0
    if spec is None:
        raise UserError('--config is missing; add a config file, as in --config=configs/mnist.py')
    loaded = loading.load(spec)
    applied = overrides.apply(loaded.config, assignments)
    if not (FLAGS.help or FLAGS.helpconfig):
        # `build` checks this too, but only after importing JAX: this reports a wrong key at once.
        # `config` also shows configs whose required values are still missing.
        schema.read(loading.to_plain(loaded.config), complete=FLAGS.mode != 'config')
    # After the config is known to be valid: a note on a key that does not exist would only
    # distract.
    for override in applied:
        for note in override.notes:
            print(note, file=sys.stderr)
    if FLAGS.help or FLAGS.helpconfig:
        if FLAGS.help:
            print(_usage())
        print(show.format_helpconfig(loading.to_plain(loaded.config)))
        return 0
    if FLAGS.mode == 'config':
        print(show.format_resolved(loading.to_plain(loaded.config), applied))
        return 0
    # From here on JAX is needed. Most mistakes on the command line have been reported by now.
    logfile.quiet_environment()
    if FLAGS.mode == 'plan':
        _use_virtual_devices(FLAGS.devices)
    from trainer.modes import dispatch
    from trainer.modes.command import Command
    from trainer.parallel.processes import Cluster

    workdir = identity.default_workdir(loaded, applied)
    if FLAGS.workdir:
        workdir = places.expand(FLAGS.workdir, '--workdir')
    command = Command(
        mode=FLAGS.mode,
        workdir=workdir,
        step=FLAGS.step,
        allow_config_change=FLAGS.allow_config_change,
        overrides=dict(assignments),
        device_kind=FLAGS.device_kind,
        platforms=tuple(FLAGS.platforms),
        match=tuple(FLAGS.match),
        cluster=Cluster(
            coordinator=FLAGS.coordinator,
            num_processes=FLAGS.num_processes,
            process_id=FLAGS.process_id,
            timeout_secs=FLAGS.init_timeout,
            heartbeat_secs=FLAGS.heartbeat_timeout,
        ),
    )
    return dispatch.run(loaded, command, stop)


def _end_soon(code: int) -> None:
    """Ends the process within `_GRACE_SECS`: threads of a failed save may wait for minutes.

    If no thread is waiting, the interpreter exits normally before that. Otherwise `atexit`
    functions do not run, because Python calls them only after all threads have ended.
    """

    def exit_after_grace() -> None:
        deadline = time.monotonic() + _GRACE_SECS
        main_thread = threading.main_thread()
        # A daemon thread does not delay the exit; this one is a daemon itself.
        while any(t is not main_thread and not t.daemon for t in threading.enumerate()):
            if time.monotonic() > deadline:
                for output in (sys.stdout, sys.stderr):
                    with contextlib.suppress(Exception):
                        output.flush()
                os._exit(code)  # Skips no log line: each one is flushed when written.
            time.sleep(0.05)

    threading.Thread(target=exit_after_grace, name='end-soon', daemon=True).start()


def _is_reader_gone() -> bool:
    """Whether the reader of stdout has exited, as with `| head`; then discards further output."""
    try:
        print(flush=True)
    except BrokenPipeError:
        # Python flushes stdout at exit: into the closed pipe, that would fail once more.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        return True
    return False


def _use_virtual_devices(count: int | None) -> None:
    """Makes JAX, which has not been imported yet, create this many virtual CPU devices."""
    if count is None:
        raise UserError('--mode=plan needs --devices=N, the number of devices to plan for')
    # JAX and XLA read both variables once, when they start.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    flag = f'--xla_force_host_platform_device_count={count}'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'


def _usage() -> str:
    return f'{__doc__}\n{FLAGS.get_help()}'


if __name__ == '__main__':
    code = 1
    # Before `main`: an error while a config is imported should have a short traceback too.
    traces.install(logfile.full_traceback_location)
    try:
        code = main(sys.argv, STOP)
    finally:
        # Threads of the failed save may wait for a slow disk or network for minutes, and the
        # interpreter would wait for them.
        if SaveError.occurred:
            _end_soon(code)
    sys.exit(code)
