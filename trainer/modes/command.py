# SPDX-License-Identifier: Apache-2.0
"""The parsed command line, and what several modes do with it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping

import numpy as np
from etils import epath

from trainer.config import diff, identity
from trainer.config.errors import UserError
from trainer.observe.npz import write_npz
from trainer.parallel import processes
from trainer.parallel.processes import Cluster
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


def restore(trainer: Trainer, command: Command) -> TrainState:
    """Returns the state of the checkpoint; says where the config is not that of its run."""
    experiment = trainer.experiment
    changes = workdir_of(trainer).config_changes(
        experiment.origin.config, experiment.origin.schedule_steps
    )
    if changes := identity.identity_changes(changes):
        print(f'The config is not that of the run:\n{diff.format_diff(changes)}', file=sys.stderr)
    return trainer.restore(command.step)


def workdir_of(trainer: Trainer) -> Workdir:
    """Returns the work directory, which a run of the command line always has."""
    assert trainer.workdir is not None
    return trainer.workdir


def write_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz file, in the first process.

    Raises:
        UserError: if it cannot be written.
    """
    if not processes.is_main_process():
        return
    try:
        write_npz(path, arrays)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror or error}') from error
