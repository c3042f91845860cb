# SPDX-License-Identifier: Apache-2.0
"""`--mode=train`: trains, or reports that the run has already finished."""

from __future__ import annotations

import signal

import jax

from trainer.checkpoint import manager as checkpoint
from trainer.modes.command import Command, workdir_of
from trainer.observe import logfile
from trainer.parallel import last_words
from trainer.parallel.signals import StopRequest
from trainer.run.agreement import create_workdir
from trainer.trainer import Trainer


def run(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Trains, unless the run has finished."""
    # Before the log is opened: a run that may not start here must not write to the files of another
    # one.
    trainer.check_workdir()
    if _report_finished(trainer):
        return 0
    # After the checks, which often end the process at once; the import takes seconds.
    checkpoint.preload()
    workdir = workdir_of(trainer)
    create_workdir(workdir)
    logfile.route(workdir.path, jax.process_index())
    try:
        several = jax.process_count() > 1
        with last_words.register(lambda _, message: logfile.record(message), stay=several):
            result = trainer.fit()
    except BaseException as error:
        logfile.record_error(error)
        raise
    finally:
        # Written here and not in the signal handler, which may interrupt a write to the same file.
        if stop.signal is not None:
            logfile.record(f'received {signal.Signals(stop.signal).name}')
    if result.status in ('interrupted', 'preempted'):
        trainer.report.progress.message('Run the same command again to continue.')
    return 0 if result.status in ('finished', 'stopped_early') else stop.exit_code


def _report_finished(trainer: Trainer) -> bool:
    """Prints the result of a run that has already finished; returns whether it has."""
    workdir, total = workdir_of(trainer), trainer.experiment.training.total_steps
    latest = trainer.checkpoints.latest() if trainer.checkpoints else None
    result = workdir.result() if latest is not None else None
    # The result may be of an earlier, shorter run, with newer checkpoints after it.
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
