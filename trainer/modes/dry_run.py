# SPDX-License-Identifier: Apache-2.0
"""`--mode=dry_run`: runs one step, one batch of each evaluation and one save, and keeps nothing."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from trainer.checkpoint.manager import Checkpoints
from trainer.checkpoint.storable import check_storable
from trainer.config.errors import UserError
from trainer.experiment import Experiment
from trainer.modes.command import Command
from trainer.observe import logfile
from trainer.observe.progress import duration
from trainer.observe.table import human_bytes, nbytes
from trainer.parallel import processes
from trainer.parallel.signals import StopRequest
from trainer.run import banner
from trainer.tasks.metrics import non_finite_names
from trainer.trainer import Trainer


def run(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Rehearses the run without touching its work directory."""
    logfile.route(None)
    rehearse(trainer.experiment, command.workdir)
    return 0


def rehearse(experiment: Experiment, workdir: str) -> None:
    """Runs one step, one batch of each evaluation and one save, and prints each result.

    Args:
        experiment: what would be trained.
        workdir: the work directory of the run; nothing in it is read or written.

    Raises:
        UserError: if a loss is not finite or a label is out of range, and for all mistakes that
            `Trainer.compile` reports.
    """
    # Without a work directory, so that nothing in it is touched.
    dry = Trainer(experiment)
    programs = dry.compile()
    setup = dry.set_up()
    check_storable(setup.programs.abstract)
    print(banner.summary(experiment, setup.programs.abstract, setup.mesh, None, 0))
    for program in programs:
        program.executable()
        print(f'{program.name}: compiled in {duration(program.compile_secs)}')
    with dry.batches(0, [1]) as batches:
        batch = next(iter(batches)).arrays
        state = dry.init_state()
        # Before the step, which donates the state.
        dry.monitors().begin(0, state)
        state = setup.programs.step(state, batch)
    # Labels first: one that is out of range makes the loss non-finite too.
    dry.monitors().check_labels(state)
    _check_finite(state.metrics)
    print('train step OK')
    for name, evaluator in setup.evaluators.items():
        evaluator.run(state, max_batches=1)
        print(f'eval {name} OK (one batch)')
    with _save_directory(workdir) as directory:
        checkpoints = Checkpoints(directory, experiment.saving.retention)
        checkpoints.save(1, state, {})
        checkpoints.close()
    print(f'checkpoint OK ({human_bytes(nbytes(state))})')
    print('Everything works; nothing was kept.')


def _check_finite(metrics: Any) -> None:
    if bad := [name for name in non_finite_names(metrics) if name.endswith('loss')]:
        raise UserError(
            f'train/{bad[0]} is not finite after one step. Do the labels match the number of '
            'classes? --mode=train names the module where the first such value appears'
        )


@contextlib.contextmanager
def _save_directory(workdir: str) -> Iterator[epath.Path]:
    """Yields a temporary directory for a save, which all processes can see.

    Processes may each have their own `/tmp`: several of them save beside the work directory.
    """
    if jax.process_count() == 1:
        with tempfile.TemporaryDirectory() as directory:
            yield epath.Path(directory)
        return
    # The sum spreads the number of the main process: all must use the same directory, and two dry
    # runs must not.
    number = secrets.randbits(32) if processes.is_main_process() else 0
    directory = f'{workdir}.dry_run_{processes.sum_over_processes(number):x}'
    try:
        yield epath.Path(directory)
    finally:
        if processes.is_main_process():
            epath.Path(directory).rmtree(missing_ok=True)
