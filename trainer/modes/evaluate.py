# SPDX-License-Identifier: Apache-2.0
"""`--mode=eval`: prints the metrics of a checkpoint."""

from __future__ import annotations

from trainer.config.errors import UserError
from trainer.modes.command import Command, restore, workdir_of, write_arrays
from trainer.modules.shapes import describe
from trainer.observe import logfile
from trainer.observe.summary_files import write_files
from trainer.parallel.signals import StopRequest
from trainer.trainer import Trainer


def run(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Prints the metrics of a checkpoint, and writes arrays and summaries to files."""
    logfile.route(None)
    if not trainer.experiment.evals:
        raise UserError('--mode=eval needs at least one evaluation in config.evals')
    state = restore(trainer, command)
    print(f'checkpoint of step {int(state.step):,} in {command.workdir}')
    for name, metrics in trainer.evaluate(state).items():
        values = '  '.join(f'{key} {value:.6g}' for key, value in metrics.items())
        print(f'eval {name}: {values}')
        if metrics.arrays:
            path = workdir_of(trainer).path / f'metrics_{name}_{int(state.step)}.npz'
            write_arrays(path, metrics.arrays)
            kinds = [f'{key} {describe(array)}' for key, array in metrics.arrays.items()]
            print(f'{path}: {", ".join(kinds)}')
        # Only the main process has summaries.
        by_name = {f'eval/{name}/{key}': summary for key, summary in metrics.summaries.items()}
        for file in write_files(workdir_of(trainer).path, int(state.step), by_name):
            print(file)
    return 0
