# SPDX-License-Identifier: Apache-2.0
"""`--mode=predict`: writes the predictions of a checkpoint as .npz files."""

from __future__ import annotations

from typing import Any

from trainer.config.errors import UserError
from trainer.evaluate.host_rows import join_batches
from trainer.modes.command import Command, restore, workdir_of, write_arrays
from trainer.observe import logfile
from trainer.parallel import processes
from trainer.parallel.signals import StopRequest
from trainer.trainer import Trainer


def run(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Writes the predictions for each split of `config.evals`."""
    logfile.route(None)
    workdir = workdir_of(trainer)
    state = restore(trainer, command)
    if not trainer.experiment.evals:
        raise UserError('--mode=predict needs at least one evaluation in config.evals')
    for name in trainer.experiment.evals:
        batches = []
        # All processes compute, and only the main process needs the memory for all predictions.
        for batch in trainer.predict(name, state):
            batches.append(batch if processes.is_main_process() else {})
        if not batches:
            raise UserError(f'config.evals.{name}.data: the stream has no examples')
        arrays: dict[str, Any] = join_batches(batches)
        path = workdir.path / f'predictions_{name}_{int(state.step)}.npz'
        if processes.is_main_process():
            write_arrays(path, arrays)
            num_examples = len(next(iter(arrays.values())))
            print(f'{path}: {", ".join(arrays)} of {num_examples:,} examples')
    return 0
