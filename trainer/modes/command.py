# SPDX-License-Identifier: Apache-2.0
"""The parsed command line, and helpers shared by several modes."""

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
    """The parsed command line.

    Attributes:
        mode: one of `trainer.modes.flags.MODES`, but not 'config'.
        workdir: the run's directory.
        step: the checkpoint to read: 'latest', 'best' or a number.
        allow_config_change: resume even though the config identifies a different run.
        overrides: text of each override, as given, by config path.
        device_kind: accelerator that `--mode=plan` compares with.
        platforms: platforms that `--mode=export` compiles for.
        match: patterns for paths of the modules that `--mode=grad_probe` records.
        cluster: how the processes of the run find each other.
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
    """Returns the state of the checkpoint; prints where the config differs from that of its run."""
    experiment = trainer.experiment
    changes = workdir_of(trainer).config_changes(
        experiment.origin.config, experiment.origin.schedule_steps
    )
    # A note and not an error: evaluating a checkpoint with another config is legitimate.
    if changes := identity.identity_changes(changes):
        text = diff.format_diff(changes)
        print(
            f'The config differs from the one this run was trained with:\n{text}', file=sys.stderr
        )
    return trainer.restore(command.step)


def workdir_of(trainer: Trainer) -> Workdir:
    """Returns the work directory; a run started from the command line always has one."""
    assert trainer.workdir is not None
    return trainer.workdir


def write_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz file, in the main process.

    Raises:
        UserError: if it cannot be written.
    """
    if not processes.is_main_process():
        return
    try:
        write_npz(path, arrays)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror or error}') from error
