# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen backbone, computed once: every later epoch trains the head alone."""

from __future__ import annotations

import numpy as np
from etils import epath

from trainer.config import places
from trainer.config.errors import UserError
from trainer.observe.npz import write_npz
from trainer.parallel import processes
from trainer.step.state import TrainState
from trainer.trainer import Trainer


def precompute(
    trainer: Trainer, evaluation: str, path: epath.PathLike, state: TrainState | None = None
) -> dict[str, np.ndarray]:
    """Writes what an evaluation predicts to an .npz file, for `trainer.data.npz:Npz`; returns it.

    Args:
        trainer: all processes of a run must call this, and the first one writes.
        evaluation: its name in the config; its task is `trainer.tasks:Features` or has `predict`.
        path: of the file.
        state: whose features; by default those of a fresh run, with `config.init_from`'s weights.

    Raises:
        UserError: if there is no such evaluation, or the model has no such method.
    """
    evaluators = trainer.set_up().evaluators
    if evaluation not in evaluators:
        have = ', '.join(evaluators) or 'none'
        raise UserError(
            f'precompute: there is no evaluation {evaluation!r}; config.evals has {have}'
        )
    state = trainer.init_state() if state is None else state
    batches = list(trainer.predict(evaluation, state))
    arrays = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    if processes.is_main_process():
        file = epath.Path(places.expand(path, 'precompute'))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_npz(file, arrays)
    return arrays
