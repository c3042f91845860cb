# SPDX-License-Identifier: Apache-2.0
"""`--mode=dry_run`: one of everything that a run does, of which nothing is kept."""

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
    """Rehearses the run beside its work directory."""
    logfile.route(None)
    rehearse(trainer.experiment, command.workdir)
    return 0


def rehearse(experiment: Experiment, workdir: str) -> None:
    """Does one of everything that a run does, and says so.

    Args:
        experiment: what would be trained.
        workdir: where; nothing in it is read or written.

    Raises:
        UserError: if a loss is no number or a label out of its range, and for all that
            `Trainer.compile` refuses.
    """
    dry = Trainer(experiment)
    programs = dry.compile()
    setup = dry.set_up()
    check_storable(setup.programs.abstract)
    print(banner.summary(dry.run, setup, 0))
    for program in programs:
        program.executable()
        print(f'{program.name}: compiled in {duration(program.compile_secs)}')
    with dry.batches(0, [1]) as batches:
        batch = next(iter(batches)).arrays
        state = dry.init_state()
        dry.monitors().begin(0, state)
        state = setup.programs.step(state, batch)
    dry.monitors().check_labels(state)
    _check_finite(state.metrics)
    print('train: one step is fine')
    for name, evaluator in setup.evaluators.items():
        evaluator.run(state, max_batches=1)
        print(f'eval {name}: one batch is fine')
    with _directory(workdir) as directory:
        checkpoints = Checkpoints(directory, experiment.saving.retention)
        checkpoints.save(1, state, {})
        checkpoints.close()
    print(f'a save is fine: {human_bytes(nbytes(state))}')
    print('Everything works; nothing was kept.')


def _check_finite(metrics: Any) -> None:
    if bad := [name for name in non_finite_names(metrics) if name.endswith('loss')]:
        raise UserError(
            f'one step works, but train/{bad[0]} is not finite. Do the labels fit the number of '
            'classes? --mode=train names the module it comes from'
        )


@contextlib.contextmanager
def _directory(workdir: str) -> Iterator[epath.Path]:
    """Yields a directory for a save that is not kept; of several processes, one that all can see.

    Each may have a `/tmp` of its own, so theirs is beside the work directory.
    """
    if jax.process_count() == 1:
        with tempfile.TemporaryDirectory() as directory:
            yield epath.Path(directory)
        return
    number = secrets.randbits(32) if processes.is_primary() else 0
    directory = f'{workdir}.dry_run_{processes.sum_over_processes(number):x}'
    try:
        yield epath.Path(directory)
    finally:
        if processes.is_primary():
            epath.Path(directory).rmtree(missing_ok=True)
