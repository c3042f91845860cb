# SPDX-License-Identifier: Apache-2.0
"""Checks that all processes of a run have the same config, versions, data and work directory."""

from __future__ import annotations

import contextlib
import platform
import secrets
import time
from collections.abc import Mapping

import jax
from etils import epath

from trainer.checkpoint.manager import Checkpoints
from trainer.config import python_objects
from trainer.config.errors import UserError
from trainer.evaluate.evaluator import Evaluator
from trainer.experiment import Experiment
from trainer.input.fingerprint import fingerprint
from trainer.parallel import processes
from trainer.run.workdir import Workdir, versions

# A network disk may show the files of another host only after some seconds.
_VISIBLE_SECS = 15.0


def create_workdir(workdir: Workdir) -> None:
    """Creates the work directory, and checks that all processes write to the same one.

    Otherwise the first save would wait for files that other processes write elsewhere. All
    processes must call it.

    Raises:
        UserError: in every process, if the directory is not writable or not shared.
    """
    if jax.process_count() == 1:
        workdir.create()
        return
    problem, token = '', secrets.token_hex(8)
    own = _token_file(workdir, jax.process_index())
    try:
        workdir.create()
        own.write_text(token)
    except (UserError, OSError) as error:
        problem = str(error)
    written = processes.gather([problem, token, platform.node()])
    for number, (each, _, _) in enumerate(written):
        if each:
            raise UserError(f'process {number} of {len(written)}: {each}')
    unseen = [
        number
        for number, (_, text, _) in enumerate(written)
        if not _shows(_token_file(workdir, number), text)
    ]
    found = processes.gather(unseen)
    own.unlink(missing_ok=True)
    for reader, numbers in enumerate(found):
        if numbers:
            writer = numbers[0]
            raise UserError(
                f'the work directory {workdir.path} is not shared: process {reader} on '
                f'{written[reader][2]} does not see a file that process {writer} on '
                f'{written[writer][2]} has written there. Use a --workdir on a disk that all '
                'hosts share.'
            )


def _token_file(workdir: Workdir, number: int) -> epath.Path:
    return workdir.path / f'.shared.{number}'


def _shows(path: epath.Path, text: str) -> bool:
    deadline = time.monotonic() + _VISIBLE_SECS
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


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
