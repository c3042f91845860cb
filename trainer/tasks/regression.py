# SPDX-License-Identifier: Apache-2.0
"""Regression: squared, absolute and Huber errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import optax

from trainer.config.errors import UserError
from trainer.tasks import returned
from trainer.tasks.extra_metrics import add_to_means
from trainer.tasks.task import Batch, TaskOutput

_ERRORS: dict[str, Callable[..., jax.Array]] = {
    'squared': optax.squared_error,
    'absolute': lambda prediction, target: jnp.abs(prediction - target),
    'huber': optax.huber_loss,
}
_MEANS = ('loss', 'mean_absolute_error')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    """Squared (or absolute, or Huber) error, averaged over the output's dimensions.

    Attributes:
        inputs: batch key of the model's input.
        targets: batch key of the targets, with the shape of the model's output.
        weight: batch key of per-example weights, or None.
        loss: 'squared', 'absolute' or 'huber'.
        ignore_nan: whether targets that are NaN are missing: they are left out of losses and
            metrics.
        extra_metrics: metrics by name, such as `trainer.metrics:Spearman`. They may read the
            outputs `predictions` and `targets`.
    """

    inputs: str = 'inputs'
    targets: str = 'targets'
    weight: str | None = None
    loss: str = 'squared'
    ignore_nan: bool = False
    extra_metrics: Mapping[str, type[clu.metrics.Metric]] = dataclasses.field(
        default_factory=dict, hash=False
    )

    def __post_init__(self) -> None:
        if self.loss not in _ERRORS:
            raise ValueError(f'loss: expected one of {", ".join(_ERRORS)}, got {self.loss!r}')
        add_to_means(_MEANS, self.extra_metrics)

    @property
    def metrics(self) -> type[clu.metrics.Collection]:
        """loss, mean absolute error and extra metrics."""
        return add_to_means(_MEANS, self.extra_metrics)

    def __call__(self, model: Callable[..., Any], batch: Batch) -> TaskOutput:
        """Returns per-example errors.

        Raises:
            UserError: if the shapes of output and target differ.
        """
        prediction, targets = self._prediction(model, batch), batch[self.targets]
        # (batch, 1) and (batch,) would broadcast to (batch, batch) without an error.
        if prediction.shape != targets.shape:
            raise UserError(
                f'config.task: the model returned shape {prediction.shape}, but the field '
                f'{self.targets!r} has shape {targets.shape}; broadcasting them would average over '
                'pairs. Make the shapes equal'
            )

        counted = ~jnp.isnan(targets) if self.ignore_nan else None
        if counted is not None:
            # Before the errors are computed, because the gradient of 0 x NaN is NaN.
            targets = jnp.where(counted, targets, 0)
        loss = _mean_per_example(_ERRORS[self.loss](prediction, targets), counted)
        # Reported for any loss, so that runs with different losses can be compared.
        error = _mean_per_example(jnp.abs(prediction - targets), counted)
        weights = None if self.weight is None else batch[self.weight]
        if counted is not None:
            is_labeled = counted.reshape(len(counted), -1).any(-1).astype(jnp.float32)
            weights = is_labeled if weights is None else is_labeled * weights
        metrics = {'mean_absolute_error': error}
        if self.extra_metrics:
            metrics.update(predictions=prediction, targets=targets)
        return TaskOutput(loss=loss, weights=weights, metrics=metrics)

    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, jax.Array]:
        """Returns the model's output for each example."""
        return {'prediction': self._prediction(model, batch)}

    def _prediction(self, model: Callable[..., Any], batch: Batch) -> jax.Array:
        return returned.require_array(model(batch[self.inputs]), self, 'prediction')


def _mean_per_example(values: jax.Array, counted: jax.Array | None) -> jax.Array:
    """Returns the mean of the values that count, (batch,); 0 where none does."""
    values = values.reshape(values.shape[0], -1)
    if counted is None:
        return values.mean(-1)
    counted = counted.reshape(values.shape)
    return jnp.where(counted, values, 0).sum(-1) / jnp.maximum(counted.sum(-1), 1)
