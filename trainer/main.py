# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m trainer.main --config=configs/mnist.py [--config.key=value ...]`."""

from __future__ import annotations

import sys

if __name__ == '__main__':
    # Before all other imports, which take seconds: a signal may arrive during them.
    from trainer.observe import streams
    from trainer.parallel import signals

    STOP = signals.install()
    if not signals.is_training_command(sys.argv):
        signals.uninstall()
    streams.open_closed_streams()
    signals.enable_stack_dumps()

import contextlib
import os
import threading
import time
from collections.abc import Sequence

from absl import flags

from trainer.checkpoint.errors import SaveError
from trainer.config import identity, loading, overrides, places, schema, show, synonyms, traces
from trainer.config.errors import UserError, full_text, shortened, shown
from trainer.config.sections import Sections
from trainer.modes.plan.devices import KINDS as DEVICE_KINDS
from trainer.observe import logfile
from trainer.parallel import signals

MODES = {
    'train': 'trains, or resumes the run in the work directory',
    'eval': 'prints the metrics of a checkpoint',
    'predict': 'writes the predictions of a checkpoint',
    'dry_run': 'does one of everything that a run does, and keeps nothing',
    'summary': 'prints the parameters and the modules of the model',
    'plan': 'says what a step needs on devices that need not be here',
    'grad_probe': 'writes gradients of the loss with respect to intermediate values',
    'export': 'writes a checkpoint for programs that know nothing of this one',
    'config': 'prints the resolved config, and where each value comes from',
}
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')

_FLAGS = flags.FlagValues()
flags.DEFINE_string(
    'workdir',
    None,
    'Directory of the run; default: runs/ and a name made of config and overrides.',
    flag_values=_FLAGS,
)
flags.DEFINE_enum(
    'mode',
    'train',
    list(MODES),
    'What to do with the config:\n' + '\n'.join(f'{n}: {text}' for n, text in MODES.items()),
    flag_values=_FLAGS,
)
flags.DEFINE_string(
    'step',
    'latest',
    "Checkpoint for eval, predict, export and grad_probe: a step, 'latest' or 'best'.",
    flag_values=_FLAGS,
)
flags.DEFINE_bool(
    'allow_config_change',
    False,
    'Resume even though the config has changed.',
    flag_values=_FLAGS,
)
flags.DEFINE_string(
    'coordinator',
    None,
    "Of several processes: 'host:port' of the first. SLURM, Open MPI and TPUs need no such flag.",
    flag_values=_FLAGS,
)
flags.DEFINE_integer('num_processes', None, 'How many processes there are.', flag_values=_FLAGS)
flags.DEFINE_integer('process_id', None, 'Index of this process, from 0.', flag_values=_FLAGS)
flags.DEFINE_integer(
    'init_timeout', 300, 'Seconds to wait for the other processes.', flag_values=_FLAGS
)
flags.DEFINE_integer(
    'heartbeat_timeout',
    100,
    'Seconds without a heartbeat after which a process is considered dead.',
    flag_values=_FLAGS,
)
flags.DEFINE_integer(
    'devices',
    None,
    'With --mode=plan: on how many devices; virtual ones, nothing runs.',
    lower_bound=1,
    flag_values=_FLAGS,
)
flags.DEFINE_enum(
    'device_kind',
    None,
    DEVICE_KINDS,
    'With --mode=plan: the accelerator whose memory and speed the plan is compared with.',
    flag_values=_FLAGS,
)
flags.DEFINE_list(
    'platforms',
    ['cpu', 'cuda', 'tpu'],
    'With --mode=export: what the function is compiled for.',
    flag_values=_FLAGS,
)
flags.DEFINE_multi_string(
    'match',
    [],
    'With --mode=grad_probe: a pattern for paths of modules; may be given several times.',
    flag_values=_FLAGS,
)
flags.DEFINE_bool('helpconfig', False, 'List every key of the config.', flag_values=_FLAGS)
flags.DEFINE_bool('help', False, 'Show this and the keys of the config.', flag_values=_FLAGS)


# How long a process whose save has failed waits for its other threads.
_GRACE_SECS = 5.0

# Flags that only some of the modes read.
_ONLY_WITH = {
    'step': ('eval', 'predict', 'export', 'grad_probe'),
    'allow_config_change': ('train',),
    'devices': ('plan',),
    'device_kind': ('plan',),
    'platforms': ('export',),
    'match': ('grad_probe',),
}


def main(argv: Sequence[str], stop: signals.StopRequest) -> int:
    """Runs the command line and returns the exit code.

    Args:
        argv: program name and arguments.
        stop: set by a signal handler when the run shall end.
    """
    try:
        code = _run(argv, stop)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f'Error: {full_text(error)}', file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 1


def _run(argv: Sequence[str], stop: signals.StopRequest) -> int:
    spec, assignments, rest = overrides.parse_argv(list(argv[1:]))
    _parse_flags([argv[0], *rest])
    if _FLAGS.mode != 'train':
        signals.uninstall()
    if spec is None and _FLAGS.help:
        print(_usage())
        return 0
    if spec is None:
        raise UserError('--config is missing: name a config file, as in --config=configs/mnist.py')
    loaded = loading.load(spec)
    applied = overrides.apply(loaded.config, assignments)
    if not (_FLAGS.help or _FLAGS.helpconfig):
        # Here and not in `build` alone, which needs JAX: a wrong key is reported at once, in any
        # mode. What has yet to be given is part of what `config` shows.
        schema.read(loading.plain(loaded.config), complete=_FLAGS.mode != 'config')
    for override in applied:
        for note in override.notes:
            print(note, file=sys.stderr)
    if _FLAGS.help or _FLAGS.helpconfig:
        if _FLAGS.help:
            print(_usage())
        print(show.helpconfig(loading.plain(loaded.config)))
        return 0
    if _FLAGS.mode == 'config':
        print(show.resolved(loading.plain(loaded.config), applied))
        return 0
    # From here on JAX is needed; most wrong command lines never get so far.
    logfile.quiet_environment()
    if _FLAGS.mode == 'plan':
        _use_virtual_devices(_FLAGS.devices)
    from trainer.modes import dispatch
    from trainer.modes.command import Command
    from trainer.parallel.processes import Cluster

    workdir = identity.default_workdir(loaded, applied)
    if _FLAGS.workdir:
        workdir = places.expand(_FLAGS.workdir, '--workdir')
    command = Command(
        mode=_FLAGS.mode,
        workdir=workdir,
        step=_FLAGS.step,
        allow_config_change=_FLAGS.allow_config_change,
        overrides=dict(assignments),
        device_kind=_FLAGS.device_kind,
        platforms=tuple(_FLAGS.platforms),
        match=tuple(_FLAGS.match),
        cluster=Cluster(
            coordinator=_FLAGS.coordinator,
            num_processes=_FLAGS.num_processes,
            process_id=_FLAGS.process_id,
            timeout_secs=_FLAGS.init_timeout,
            heartbeat_secs=_FLAGS.heartbeat_timeout,
        ),
    )
    return dispatch.run(loaded, command, stop)


def _end_soon(code: int) -> None:
    """Ends the process soon, although threads of a failed save may wait for minutes.

    If no thread waits, the interpreter exits normally before this does. Otherwise, functions
    registered with `atexit` do not run: they would run after the end of all threads.
    """

    def work() -> None:
        deadline = time.monotonic() + _GRACE_SECS
        main_thread = threading.main_thread()
        while any(t is not main_thread and not t.daemon for t in threading.enumerate()):
            if time.monotonic() > deadline:
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(Exception):
                        stream.flush()
                os._exit(code)  # Log files are flushed after each line.
            time.sleep(0.05)

    threading.Thread(target=work, name='end-soon', daemon=True).start()


def _reader_is_gone() -> bool:
    """Whether nobody reads the output any more, as under `| head`; then it leads nowhere."""
    try:
        print(flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return True
    return False


def _parse_flags(argv: Sequence[str]) -> None:
    for name in _FLAGS:
        _FLAGS[name].unparse()  # What an earlier call of `main` was given.
    try:
        words = _FLAGS(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        hint = synonyms.hint(error.flagname, {}, lambda *_: True) or ''
        hint = hint.replace('mean config.', 'mean --config.')
        if error.flagname.partition('.')[0] in schema.fields(Sections):
            hint = f'Keys of the config are written --config.{error.flagname}=VALUE.'
        raise UserError(f'{error}. {hint}' if hint else f'{error}. See --help.') from error
    except flags.Error as error:
        raise UserError(f'{shortened(str(error), 400)}. See --help.') from error
    if _FLAGS.workdir == '' or (_FLAGS.workdir or '').startswith('-'):
        raise UserError(f'--workdir needs a value, got {_FLAGS.workdir!r}')
    for name, modes in _ONLY_WITH.items():
        if _FLAGS[name].present and _FLAGS.mode not in modes:
            which = ' or '.join(f'--mode={mode}' for mode in modes)
            raise UserError(f'--{name} goes with {which}; --mode={_FLAGS.mode} does not read it')
    unknown = [name for name in _FLAGS.platforms if name not in PLATFORMS]
    if unknown or not _FLAGS.platforms:
        given = repr(unknown[0]) if unknown else 'nothing'
        raise UserError(f'--platforms: expected some of {", ".join(PLATFORMS)}, got {given}')
    if words:
        raise UserError(
            f'{shown(words[0])} is not a flag; overrides are written --config.key=value. '
            'See --help.'
        )


def _use_virtual_devices(count: int | None) -> None:
    """Lets JAX, which has not started yet, have so many CPU devices."""
    if count is None:
        raise UserError('--mode=plan needs --devices=N: the number of devices to plan for')
    os.environ['JAX_PLATFORMS'] = 'cpu'
    flag = f'--xla_force_host_platform_device_count={count}'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'


def _usage() -> str:
    return f'{__doc__}\n{_FLAGS.get_help()}'


if __name__ == '__main__':
    code = 1
    traces.install(logfile.full_traceback_location)
    try:
        code = main(sys.argv, STOP)
    finally:
        if SaveError.occurred:
            _end_soon(code)
    sys.exit(code)
