# SPDX-License-Identifier: Apache-2.0
"""Checks that all processes of a run have the same config, versions, data and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.checkpoint.manager import Checkpoints
from trainer.config import python_objects
from trainer.evaluate.evaluator import Evaluator
from trainer.experiment import Experiment
from trainer.input.fingerprint import fingerprint
from trainer.parallel import processes
from trainer.run.workdir import Workdir, versions


def check_run(
    experiment: Experiment, workdir: Workdir | None, checkpoints: Checkpoints | None
) -> None:
    """Checks, before anything is traced, that all processes run the same thing.

    All processes must call it.

    Args:
        experiment: what this process trains.
        workdir: its work directory, or None.
        checkpoints: those of the work directory, or None without one.

    Raises:
        UserError: in every process, naming the difference in config, versions, data or checkpoints.
    """
    # Otherwise a difference would show only in the first collective, which then hangs or adds up
    # values that do not belong together.
    processes.check_agreement(
        {
            'config': python_objects.copy_as_dicts(experiment.origin.config),
            'versions': versions(),
            'data': fingerprint(experiment.data),
            'workdir': None if workdir is None else str(workdir.path),
            'newest checkpoint': None if checkpoints is None else checkpoints.latest(),
        }
    )


def check_evaluations(evaluators: Mapping[str, Evaluator]) -> None:
    """Checks that the processes of a run evaluate the same data; all of them must call it.

    Raises:
        UserError: in every process, naming what differs.
    """
    splits = {name: fingerprint(each.data) for name, each in evaluators.items()}
    processes.check_agreement({'data of evals': splits})
