# SPDX-License-Identifier: Apache-2.0
"""Precomputes the features of a frozen backbone, so that later runs train the head alone."""

from __future__ import annotations

import numpy as np
from etils import epath

from trainer.config import places
from trainer.config.errors import UserError
from trainer.evaluate.host_rows import describe_shapes, join_batches
from trainer.observe.npz import write_npz
from trainer.parallel import processes
from trainer.step.state import TrainState
from trainer.trainer import Trainer


def precompute(
    trainer: Trainer, evaluation: str, path: epath.PathLike, state: TrainState | None = None
) -> dict[str, np.ndarray]:
    """Writes the predictions of an evaluation to an .npz file, for `trainer.data.npz:Npz`.

    Args:
        trainer: trainer of the run; all processes must call this function, and the main process
            writes.
        evaluation: its name in the config; its task is `trainer.tasks:Features` or has `predict`.
        path: the .npz file to write.
        state: state to predict with; by default that of a fresh run, with the weights of
            `config.init_from`.

    Returns:
        The arrays of the file, by name; in processes other than the main process, without fields
        that `predict` returns unchanged.

    Raises:
        UserError: if there is no such evaluation, or its task cannot predict, or its batches differ
            in length.
    """
    evaluators = trainer.set_up().evaluators
    if evaluation not in evaluators:
        names = ', '.join(evaluators) or 'none'
        raise UserError(
            f'precompute: there is no evaluation {evaluation!r}; config.evals has {names}'
        )
    state = trainer.init_state() if state is None else state
    # In all processes: predicting is collective.
    batches = list(trainer.predict(evaluation, state))
    for name in batches[0]:
        shapes = {batch[name].shape[1:] for batch in batches}
        if len(shapes) > 1:
            # In the file, padding would be features like all others.
            raise UserError(
                f'precompute: batches differ in length: {name!r} is {describe_shapes(shapes)}; '
                f'give the source of config.evals.{evaluation} one length, such as lengths=(64,)'
            )
    arrays = join_batches(batches)
    if processes.is_main_process():
        file = epath.Path(places.expand(path, 'precompute'))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_npz(file, arrays)
    return arrays
