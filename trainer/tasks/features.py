# SPDX-License-Identifier: Apache-2.0
"""The features of a model as predictions, for `trainer.precompute`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.errors import UserError


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
