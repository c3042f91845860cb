# SPDX-License-Identifier: Apache-2.0
"""What each `--mode` does, once the config is known to be sound."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from trainer.checkpoint import manager as checkpoint
from trainer.checkpoint.manager import CheckpointError
from trainer.config import diff, identity, places
from trainer.config.errors import UserError, full_text
from trainer.config.loading import LoadedConfig
from trainer.experiment import Experiment, build
from trainer.inspect import gradient_probe, module_table
from trainer.modes.dry_run import rehearse
from trainer.modules.shapes import describe
from trainer.observe import flops, logfile
from trainer.observe.npz import write_npz
from trainer.observe.progress import Nowhere
from trainer.parallel import last_words, processes, signals
from trainer.parallel.handshake import PeerError
from trainer.parallel.mesh import batch_shards
from trainer.parallel.processes import Cluster
from trainer.parallel.signals import StopRequest
from trainer.run import banner, checks, failure, out_of_memory
from trainer.run.failure import NonFiniteError
from trainer.run.workdir import Workdir
from trainer.step.state import TrainState
from trainer.trainer import Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """The command line, parsed.

    Attributes:
        mode: one of `trainer.main.MODES`, but not 'config'.
        workdir: the run's directory.
        step: 'latest', 'best' or a number: the checkpoint that is read.
        allow_config_change: go on with a run whose identity the config has changed.
        overrides: config path to text, as given.
        device_kind: what `--mode=plan` is held against.
        platforms: what `--mode=export` compiles for.
        match: patterns of the modules that `--mode=grad_probe` looks at.
        cluster: where the processes of the run meet.
    """

    mode: str
    workdir: str
    step: str
    allow_config_change: bool
    overrides: Mapping[str, str]
    device_kind: str | None = None
    platforms: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    cluster: Cluster = dataclasses.field(default_factory=Cluster)


def run(loaded: LoadedConfig, command: Command, stop: StopRequest) -> int:
    """Joins the other processes if there are any, runs the mode, and returns the exit code.

    Raises:
        UserError: for what the config or the work directory does not allow.
    """
    _enable_compile_cache()
    # Processes that wait for this one must receive the signal too, and stop together with it.
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
    logfile.keep_stdout_for_python()
    with processes.ending_together(watch, stop):
        if processes.is_primary():
            return _run(loaded, command, stop)
        with contextlib.redirect_stdout(Nowhere()):
            return _run(loaded, command, stop)


def _run(loaded: LoadedConfig, command: Command, stop: StopRequest) -> int:
    logfile.quiet_absl()
    experiment = _build(loaded, command)
    if command.mode != 'train':
        signals.uninstall()  # Again: where processes have joined, JAX has a handler of its own.
    trainer = Trainer(
        experiment,
        command.workdir,
        stop=stop,
        allow_config_change=command.allow_config_change,
        overrides=command.overrides,
    )
    processes.check_agreement({'mode': command.mode, 'step': command.step})
    if command.mode != 'train':  # Which does so itself.
        trainer.check_agreement()
    try:
        return _MODES[command.mode](trainer, command, stop)
    except (CheckpointError, NonFiniteError) as error:
        print(f'Error: {full_text(error)}', file=sys.stderr)
        return error.exit_code
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory.is_out_of_memory(error):
            raise
        setup = trainer.set_up()
        explained = out_of_memory.explain(setup.programs, setup.mesh, error)
        text = '\n'.join([f'Error: {explained}', *getattr(error, '__notes__', ())])
        logfile.record(text)
        print(text, file=sys.stderr)
        return 1


def _build(loaded: LoadedConfig, command: Command) -> Experiment:
    """Builds the experiment; if the user's code fails there, the work directory says why."""
    try:
        return build(loaded)
    except UserError:
        raise
    except Exception as error:
        if command.mode == 'train':
            with contextlib.suppress(Exception):  # Such as a disk that is full, too.
                _record_no_start(Workdir(command.workdir), error)
        raise


def _record_no_start(workdir: Workdir, error: Exception) -> None:
    workdir.make()
    logfile.route(workdir.path, jax.process_index())
    logfile.record_error(error)
    if processes.is_primary() and workdir.is_fresh():
        described = failure.describe(error, 0)
        workdir.write_result('failed', 0, None, None, {}, described)


def _train(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    trainer.check_workdir()
    if _already_done(trainer):
        return 0
    checkpoint.preload()
    workdir = _workdir(trainer)
    workdir.make()
    logfile.route(workdir.path, jax.process_index())
    try:
        several = jax.process_count() > 1
        with last_words.registered(lambda _, message: logfile.record(message), stay=several):
            result = trainer.fit()
    except BaseException as error:
        logfile.record_error(error)
        raise
    finally:
        if stop.signal is not None:
            logfile.record(f'received {signal.Signals(stop.signal).name}')
    if result.status in ('interrupted', 'preempted'):
        trainer.report.progress.message('Run the same command again to continue.')
    return 0 if result.status in ('finished', 'stopped_early') else stop.exit_code


def _already_done(trainer: Trainer) -> bool:
    """Whether the work directory holds the finished run, which is then said."""
    workdir, total = _workdir(trainer), trainer.experiment.training.total_steps
    latest = trainer.checkpoints.latest() if trainer.checkpoints else None
    result = workdir.result() if latest is not None else None
    if result is None or result['step'] != latest:
        return False
    early = (
        trainer.experiment.training.early_stopping is not None
        and result['status'] == 'stopped_early'
    )
    if not early and (latest != total or result['status'] != 'finished'):
        return False
    why = f' ({result["status"]})' if early else ''
    print(f'{workdir.path} has already finished at step {latest:,}{why}:')
    for name, value in sorted(result['metrics'].items()):
        print(f'  {name} {value:.6g}')
    return True


def _eval(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    logfile.route(None)
    if not trainer.experiment.evals:
        raise UserError('--mode=eval runs what is in config.evals, and there is nothing')
    state = _restore(trainer, command)
    print(f'checkpoint of step {int(state.step):,} in {command.workdir}')
    for name, metrics in trainer.evaluate(state).items():
        values = '  '.join(f'{key} {value:.6g}' for key, value in metrics.items())
        print(f'eval {name}: {values}')
        if metrics.arrays:
            path = _workdir(trainer).path / f'metrics_{name}_{int(state.step)}.npz'
            _write_arrays(path, metrics.arrays)
            kinds = [f'{key} {describe(array)}' for key, array in metrics.arrays.items()]
            print(f'{path}: {", ".join(kinds)}')
    return 0


def _predict(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    logfile.route(None)
    workdir = _workdir(trainer)
    state = _restore(trainer, command)
    if not trainer.experiment.evals:
        raise UserError('--mode=predict reads the splits of config.evals, and there are none')
    for name in trainer.experiment.evals:
        batches = list(trainer.predict(name, state))
        if not batches:
            raise UserError(f'config.evals.{name}.data: its stream has no example')
        arrays: dict[str, Any] = {
            key: np.concatenate([b[key] for b in batches]) for key in batches[0]
        }
        path = workdir.path / f'predictions_{name}_{int(state.step)}.npz'
        _write_arrays(path, arrays)
        rows = len(next(iter(arrays.values())))
        print(f'{path}: {rows:,} rows of {", ".join(arrays)}')
    return 0


def _write_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    if not processes.is_primary():
        return
    try:
        write_npz(path, arrays)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror or error}') from error


def _dry_run(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    logfile.route(None)
    rehearse(trainer.experiment, command.workdir)
    return 0


def _summary(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    logfile.route(None)
    setup = trainer.set_up()
    checks.check_batch(trainer.experiment, batch_shards(setup.mesh))
    latest = trainer.checkpoints.latest() if trainer.checkpoints else None
    print(banner.summary(trainer.run, setup, latest or 0))
    print(f'\n{module_table.describe(trainer.experiment, setup)}\n')
    print(f'flops     {flops.count(setup.programs.step.jaxpr()):.3g} in a train step')
    return 0


def _plan(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    from trainer.modes.plan import plan

    logfile.route(None)
    print(plan.describe(plan.make(trainer.experiment, trainer.set_up()), command.device_kind))
    return 0


def _grad_probe(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Shows gradients of the loss with respect to intermediate values, and writes them."""
    logfile.route(None)
    experiment, workdir = trainer.experiment, _workdir(trainer)
    if experiment.ensemble is not None:
        raise UserError('--mode=grad_probe: an ensemble cannot be looked into; train one member')
    setup = trainer.set_up()
    checks.check_batch(experiment, batch_shards(setup.mesh))
    saved = trainer.checkpoints is not None and trainer.checkpoints.latest() is not None
    state = _restore(trainer, command) if saved else trainer.init_state()
    found = gradient_probe.of_next_step(trainer.run, setup, state, command.match)
    path = workdir.path / f'gradients_{int(state.step)}.npz'
    if processes.is_primary():
        workdir.make()
        write_npz(path, {each.path: each.gradient for each in found})
    print(f'gradients of the loss of step {int(state.step) + 1:,}')
    print(gradient_probe.table(found))
    print(path)
    return 0


def _export(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Writes the model for programs that know nothing of this one."""
    from trainer.modes import export

    logfile.route(None)
    export.check_alone()
    state = _restore(trainer, command)
    setup = trainer.set_up()
    if not setup.evaluators:
        raise UserError('--mode=export takes task and fields from config.evals, and there are none')
    evaluator = next(iter(setup.evaluators.values()))
    directory = _workdir(trainer).path / f'export_{int(state.step)}'
    about = export.write(
        evaluator, state, directory, axes=tuple(setup.mesh.shape), platforms=command.platforms
    )
    print(f'exported step {about["step"]:,} to {directory}: predictions of evals.{evaluator.name}')
    print(
        f'  {export.FUNCTION}({", ".join(about["arguments"])}) for {", ".join(about["platforms"])}'
    )
    for kind in ('batch', 'outputs'):
        print(f'    {kind}: ' + ', '.join(f'{name} {x}' for name, x in about[kind].items()))
    print(f'  {export.MSGPACK}, {export.SAFETENSORS}: {len(about["variables"])} arrays')
    return 0


_MODES: dict[str, Callable[[Trainer, Command, StopRequest], int]] = {
    'train': _train,
    'eval': _eval,
    'predict': _predict,
    'dry_run': _dry_run,
    'summary': _summary,
    'plan': _plan,
    'grad_probe': _grad_probe,
    'export': _export,
}


def _restore(trainer: Trainer, command: Command) -> TrainState:
    """Returns the state of the checkpoint; says where the config is not that of its run."""
    experiment = trainer.experiment
    changes = _workdir(trainer).config_changes(
        experiment.origin.config, experiment.origin.schedule_steps
    )
    if changes := identity.identity_changes(changes):
        print(f'The config is not that of the run:\n{diff.format_diff(changes)}', file=sys.stderr)
    return trainer.restore(command.step)


def _workdir(trainer: Trainer) -> Workdir:
    assert trainer.workdir is not None
    return trainer.workdir


def _enable_compile_cache() -> None:
    """Keeps compiled programs on disk: the second start of a program does not wait for XLA."""
    given, home = os.environ.get('JAX_COMPILATION_CACHE_DIR'), places.cache_directory()
    if given:
        given = places.expand(given, 'JAX_COMPILATION_CACHE_DIR')
        jax.config.update('jax_compilation_cache_dir', given)
    elif home is not None:
        jax.config.update('jax_compilation_cache_dir', os.path.join(home, 'jax-config-trainer'))
    else:  # A directory that all users can write to is no place for programs.
        print(
            'There is no home directory: compiled programs are not kept for the next start. '
            'Set JAX_COMPILATION_CACHE_DIR to keep them.',
            file=sys.stderr,
        )
        return
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)
