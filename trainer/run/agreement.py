# SPDX-License-Identifier: Apache-2.0
"""Whether the processes of a run agree on what they do."""

from __future__ import annotations

from trainer.input.fingerprint import fingerprint
from trainer.parallel import processes
from trainer.run.setup import Run, Setup
from trainer.run.workdir import versions


def check(run: Run, setup: Setup) -> None:
    """Checks that the processes of a run do the same; all of them must call it.

    Raises:
        UserError: in every process, naming what differs: config, versions, data or checkpoints.
    """
    workdir, checkpoints = run.workdir, run.checkpoints
    splits = {name: fingerprint(e.data) for name, e in setup.evaluators.items()}
    processes.check_agreement(
        {
            'config': run.experiment.origin.config,
            'versions': versions(),
            'data': fingerprint(run.experiment.data),
            'data of evals': splits,
            'workdir': None if workdir is None else str(workdir.path),
            'newest checkpoint': None if checkpoints is None else checkpoints.latest(),
        }
    )
