# SPDX-License-Identifier: Apache-2.0
"""`--mode=summary`: prints a summary of the run and the table of its modules."""

from __future__ import annotations

from trainer.inspect import module_table
from trainer.modes.command import Command
from trainer.observe import flops, logfile
from trainer.parallel.signals import StopRequest
from trainer.run import banner
from trainer.trainer import Trainer


def run(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Prints the summary of the run, its modules and parameters, and the FLOPs of a train step."""
    logfile.route(None)
    trainer.check_batch()
    setup, experiment = trainer.set_up(), trainer.experiment
    programs, mesh = setup.programs, setup.mesh
    # The banner is that of the next start: it says where the run would resume.
    latest = trainer.checkpoints.latest() if trainer.checkpoints else None
    print(banner.summary(experiment, programs.abstract, mesh, trainer.workdir, latest or 0))
    print(f'\n{module_table.describe(experiment, mesh, programs)}\n')
    print(f'compute   {flops.count(programs.step.jaxpr()):.3g} FLOPs per train step')
    return 0
