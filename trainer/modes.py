# SPDX-License-Identifier: Apache-2.0
"""What each `--mode` does, once the config is known to be sound."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping

from trainer.config.errors import UserError
from trainer.config.loading import LoadedConfig
from trainer.observe import logfile
from trainer.parallel.signals import StopRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """The command line, parsed.

    Attributes:
        mode: one of `trainer.main.MODES`, but not 'config'.
        workdir: the run's directory.
        step: 'latest', 'best' or a number: the checkpoint that eval and predict read.
        allow_config_change: go on with a run whose identity the config has changed.
        overrides: config path to text, as given.
    """

    mode: str
    workdir: str
    step: str
    allow_config_change: bool
    overrides: Mapping[str, str]


def run(loaded: LoadedConfig, command: Command, stop: StopRequest) -> int:
    """Builds the experiment, runs the mode, and returns the exit code.

    Raises:
        UserError: for what the config or the work directory does not allow.
    """
    logfile.quiet_environment()
    from trainer import experiment as experiments

    experiment = experiments.build(loaded)
    _enable_compile_cache()
    from trainer.checkpoint.manager import CheckpointError
    from trainer.trainer import Trainer

    trainer = Trainer(experiment, command.workdir, stop=stop, command=command)
    try:
        return _MODES[command.mode](trainer, command)
    except CheckpointError as error:
        print(f'Error: {error}', file=sys.stderr)
        return error.exit_code
