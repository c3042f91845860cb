# SPDX-License-Identifier: Apache-2.0
"""Runs the mode that the command line names, after the config has been checked."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

import jax

from trainer import compat
from trainer.checkpoint.errors import CheckpointError
from trainer.config import places
from trainer.config.errors import UserError, full_text
from trainer.config.loading import LoadedConfig
from trainer.experiment import Experiment, build
from trainer.modes import dry_run, evaluate, grad_probe, predict, summary, train
from trainer.modes.command import Command
from trainer.observe import logfile
from trainer.observe.progress import NullScreen
from trainer.parallel import processes, signals, virtual_devices
from trainer.parallel.handshake import PeerError
from trainer.parallel.signals import StopRequest
from trainer.run import failure, out_of_memory
from trainer.run.failure import NonFiniteError
from trainer.run.workdir import Workdir
from trainer.trainer import Trainer


def run(loaded: LoadedConfig, command: Command, stop: StopRequest) -> int:
    """Joins the other processes if there are any, runs the mode, and returns the exit code.

    Raises:
        UserError: for a mistake in the config, or a work directory that cannot be used.
    """
    # Before the first compilation: JAX sets up the cache once, at its first use.
    _enable_compile_cache()
    virtual_devices.add_threads()
    # While `stop.starting` is set, a signal ends this process at once. A process that others wait
    # for must not do so: they have to learn of the signal, and all of them stop together.
    starting, stop.starting = stop.starting, False
    try:
        watch = processes.join(command.cluster)
    except PeerError as error:
        print(f'Error: {error}', file=sys.stderr)
        return error.exit_code
    if watch is None:
        stop.starting = starting
        return _run(loaded, command, stop)
    stop.share()
    # Only with several processes, whose collectives on CPUs use Gloo.
    logfile.keep_stdout_for_python()
    with processes.exit_together(watch, stop):
        if processes.is_main_process():
            return _run(loaded, command, stop)
        # The other processes print the same; their warnings still go to standard error.
        with contextlib.redirect_stdout(NullScreen()):
            return _run(loaded, command, stop)


def _run(loaded: LoadedConfig, command: Command, stop: StopRequest) -> int:
    logfile.quiet_absl()
    experiment = _build(loaded, command)
    if command.mode != 'train':
        signals.uninstall()  # Again: joining other processes makes JAX install its own handler.
    trainer = Trainer(
        experiment,
        command.workdir,
        stop=stop,
        allow_config_change=command.allow_config_change,
        overrides=command.overrides,
    )
    # Before the mode runs: processes in different modes would wait for each other in different
    # collectives.
    processes.check_agreement({'mode': command.mode, 'step': command.step})
    if command.mode != 'train':  # Training checks this itself.
        trainer.check_agreement()
    try:
        return _mode_function(command.mode)(trainer, command, stop)
    except (CheckpointError, NonFiniteError) as error:
        print(f'Error: {full_text(error)}', file=sys.stderr)
        return error.exit_code
    except jax.errors.JaxRuntimeError as error:
        if not compat.is_out_of_memory(error):
            raise
        # Cached or traced again, which allocates nothing on the devices.
        setup = trainer.set_up()
        explained = out_of_memory.explain(setup.programs, setup.mesh, error)
        text = '\n'.join([f'Error: {explained}', *getattr(error, '__notes__', ())])
        logfile.record(text)
        print(text, file=sys.stderr)
        return 1


def _mode_function(name: str) -> Callable[[Trainer, Command, StopRequest], int]:
    """Returns the function of a mode; modules that few runs need are imported here."""
    if name == 'plan':
        from trainer.modes.plan import plan

        return plan.run
    if name == 'export':
        from trainer.modes import export

        return export.run
    modes: dict[str, Callable[[Trainer, Command, StopRequest], int]] = {
        'train': train.run,
        'eval': evaluate.run,
        'predict': predict.run,
        'dry_run': dry_run.run,
        'summary': summary.run,
        'grad_probe': grad_probe.run,
    }
    return modes[name]


def _build(loaded: LoadedConfig, command: Command) -> Experiment:
    """Builds the experiment; if user code fails meanwhile, records the error in the workdir."""
    try:
        return build(loaded)
    except UserError:
        raise
    except Exception as error:
        if command.mode == 'train':
            with contextlib.suppress(Exception):  # A full disk must not hide the user's error.
                _record_failed_start(Workdir(command.workdir), error)
        raise


def _record_failed_start(workdir: Workdir, error: Exception) -> None:
    workdir.create()
    logfile.route(workdir.path, jax.process_index())
    logfile.record_error(error)
    if processes.is_main_process() and workdir.is_fresh():
        description = failure.describe(error, 0)
        workdir.write_result('failed', 0, None, None, {}, description)


def _enable_compile_cache() -> None:
    """Caches compiled programs on disk, so that later starts need not compile them again."""
    given, home = os.environ.get('JAX_COMPILATION_CACHE_DIR'), places.cache_directory()
    if given:
        given = places.expand(given, 'JAX_COMPILATION_CACHE_DIR')
        jax.config.update('jax_compilation_cache_dir', given)
    elif home is not None:
        jax.config.update('jax_compilation_cache_dir', os.path.join(home, 'jax-config-trainer'))
    else:  # Not /tmp: programs in a directory that anyone can write to are not safe to run.
        print(
            'There is no home directory, so compiled programs are not cached for later starts. '
            'Set JAX_COMPILATION_CACHE_DIR to cache them.',
            file=sys.stderr,
        )
        return
    # JAX's defaults skip small programs, and a start compiles many of those.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)
