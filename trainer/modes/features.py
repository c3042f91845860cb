# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen backbone, computed once: every later epoch trains the head alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from trainer.config import places
from trainer.config.errors import UserError
from trainer.observe.npz import write_npz
from trainer.parallel import processes
from trainer.step.state import TrainState
from trainer.trainer import Trainer


class Features:
    """The task of an evaluation whose predictions are features, with fields of the batch beside.

    In a config: `evals.features=dict(every='never', final=False, task=dict(target=...), data=...)`.
    """

    def __init__(
        self, method: str = 'features', inputs: str = 'image', keep: Sequence[str] = ('label',)
    ):
        """Names what is computed and kept.

        Args:
            method: of the model; it takes the inputs and returns an array (batch, ...).
            inputs: the batch's field that it is called with.
            keep: fields of the batch that go with the features.
        """
        self._method = method
        self._inputs = inputs
        self._keep = tuple(keep)

    def __call__(self, model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the mean square of each example's features: a feature that died shows as 0."""
        features = self._features(model, batch)
        return jnp.square(features).reshape(len(features), -1).mean(-1)

    def predict(self, model: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the features, by that name, and the fields that are kept."""
        kept = {name: batch[name] for name in self._keep}
        return {'features': self._features(model, batch), **kept}

    def _features(self, model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        try:
            method = getattr(model, self._method)
        except AttributeError as error:
            raise UserError(
                f'{type(self).__name__}: the model has no method {self._method!r}; name the one '
                "that returns its features in the task's `method`"
            ) from error
        return method(batch[self._inputs])


def precompute(
    trainer: Trainer, evaluation: str, path: epath.PathLike, state: TrainState | None = None
) -> dict[str, np.ndarray]:
    """Writes what an evaluation predicts as an .npz file, for `data.npz:Npz`, and returns it.

    Args:
        trainer: all processes of a run must call this, and the first one writes.
        evaluation: its name in the config; its task is `Features`, or any with `predict`.
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
    if processes.is_primary():
        file = epath.Path(places.expand(path, 'precompute'))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_npz(file, arrays)
    return arrays
