# SPDX-License-Identifier: Apache-2.0
"""`--mode=grad_probe`: writes gradients of the loss with respect to intermediate values."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config.errors import UserError
from trainer.inspect import gradient_probe
from trainer.inspect.forward import Forward
from trainer.inspect.gradient_probe import Gradient
from trainer.modes.command import Command, restore, workdir_of
from trainer.observe import logfile
from trainer.observe.npz import write_npz
from trainer.parallel import processes
from trainer.parallel.signals import StopRequest
from trainer.step.state import TrainState
from trainer.trainer import Trainer


def run(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Prints a table of gradients with respect to intermediate values, and writes the arrays."""
    logfile.route(None)
    experiment, workdir = trainer.experiment, workdir_of(trainer)
    if experiment.ensemble is not None:
        raise UserError('--mode=grad_probe is not supported for ensembles; train one member')
    if experiment.data.collector is not None:
        raise UserError('--mode=grad_probe is not supported for batches that the step collects')
    # Before tracing, which would fail with a message about shapes.
    trainer.check_batch()
    # Gradients at initialization are of interest too, so a checkpoint is not required.
    saved = trainer.checkpoints is not None and trainer.checkpoints.latest() is not None
    state = restore(trainer, command) if saved else trainer.init_state()
    gradients = next_step_gradients(trainer, state, command.match)
    path = workdir.path / f'gradients_{int(state.step)}.npz'
    if processes.is_main_process():
        workdir.create()
        write_npz(path, {each.path: each.gradient for each in gradients})
    print(f'gradients of the loss of step {int(state.step) + 1:,}')
    print(gradient_probe.table(gradients))
    print(path)
    return 0


def next_step_gradients(
    trainer: Trainer, state: TrainState, match: Sequence[str] = ()
) -> list[Gradient]:
    """Returns the gradients on the next batch after a state; for a stream, on its first batch."""
    experiment, setup, step = trainer.experiment, trainer.set_up(), int(state.step)
    # For a stream this is the beginning, whatever the step: its state in the checkpoint belongs to
    # a number of processes that may differ here.
    experiment.data.restore(step, None)
    with trainer.batches(step, [1]) as batches:
        batch = next(iter(batches)).arrays
        forward = Forward.from_experiment(experiment, setup.mesh, setup.programs.task)
        return gradient_probe.gradients(forward, state, batch, match)
