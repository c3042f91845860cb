# SPDX-License-Identifier: Apache-2.0
"""A task that returns features of a model as predictions, for `trainer.precompute`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.errors import UserError


class Features:
    """The task of an evaluation whose predictions are features and fields of the batch.

    In a config: `evals.features=dict(every='never', final=False, task=dict(target=...), data=...)`.
    """

    def __init__(
        self, method: str = 'features', inputs: str = 'image', keep: Sequence[str] = ('label',)
    ):
        """Sets the method to call and the fields to keep.

        Args:
            method: method of the model that takes the inputs and returns an array (batch, ...).
            inputs: batch key of the inputs.
            keep: batch keys of fields to return with the features.
        """
        self._method = method
        self._inputs = inputs
        self._keep = tuple(keep)

    def __call__(self, model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the mean square of each example's features; 0 shows dead features."""
        # A task must return a loss, and an evaluation reports it as a metric.
        features = self._features(model, batch)
        return jnp.square(features).reshape(len(features), -1).mean(-1)

    def predict(self, model: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the features as 'features', and the fields to keep."""
        kept = {name: batch[name] for name in self._keep}
        return {'features': self._features(model, batch), **kept}

    def _features(self, model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        # Only the lookup is guarded: an AttributeError inside the method is another mistake.
        try:
            method = getattr(model, self._method)
        except AttributeError as error:
            raise UserError(
                f'{type(self).__name__}: the model has no method {self._method!r}; set the '
                'argument `method` of the task to the method that returns its features'
            ) from error
        return method(batch[self._inputs])
