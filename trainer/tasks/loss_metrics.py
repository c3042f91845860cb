# SPDX-License-Identifier: Apache-2.0
"""Metrics of sums of losses: perplexity, and bits per byte or another unit.

Each function returns a metric class, for a collection of `clu.metrics`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.errors import UserError
from trainer.tasks.metrics import WeightedMean, broadcast_weights
from trainer.tasks.sums import Sums, configure


def Perplexity(
    *, count: str | None = None, loss: str = 'loss', weights: str = 'weights'
) -> type[WeightedMean] | type[Sums]:
    """Returns the class of a metric: exp of the weighted mean of losses in nats.

    Args:
        count: the task's output of how many units an example has, (batch,) or (batch, ...), such as
            of words: the result is the perplexity per unit. None for the perplexity per loss.
        loss: the task's output of losses, (batch, ...).
        weights: the task's output of weights, (batch,) or (batch, ...).
    """
    if count is None:
        return configure(_Perplexity, 'Perplexity', _values=loss, _weights=weights)
    names = {'_loss': loss, '_weights': weights, '_count': count}
    return configure(_PerplexityPerUnit, 'Perplexity', **names)


def BitsPerUnit(*, count: str, loss: str = 'loss', weights: str = 'weights') -> type[Sums]:
    """Returns the class of a metric: the sum of losses in bits, per unit such as a byte.

    It does not depend on how a text is divided into tokens. The loss is in nats.

    Args:
        count: the task's output of how many units an example has, (batch,) or (batch, ...). Those
            of an example of weight 0 do not count.
        loss: the task's output of losses, (batch, ...).
        weights: the task's output of weights, (batch,) or (batch, ...).
    """
    return configure(_BitsPerUnit, 'BitsPerUnit', _loss=loss, _weights=weights, _count=count)


@flax.struct.dataclass
class _Perplexity(WeightedMean):
    def compute(self) -> Any:
        """Returns exp of the mean, a float; inf if it exceeds float64."""
        with np.errstate(all='ignore'):
            return float(np.exp(np.float64(self.total) / np.float64(self.weight)))


@flax.struct.dataclass
class _LossPerUnit(Sums):
    """The weighted sum of losses, and the number of units."""

    _loss: ClassVar[str]
    _weights: ClassVar[str]
    _count: ClassVar[str]

    @classmethod
    def sum_batch(cls, outputs: dict[str, Any]) -> jax.Array:
        """Returns both sums, float32 (2,).

        Raises:
            UserError: if the count is missing, or not one for each example or loss.
        """
        loss, count = (outputs.get(name) for name in (cls._loss, cls._count))
        if loss is None or count is None or count.shape != loss.shape[: count.ndim]:
            found = {name: getattr(x, 'shape', None) for name, x in outputs.items()}
            raise UserError(
                f'the metric {cls.__name__} reads the outputs {cls._loss!r} and {cls._count!r}, '
                'the latter with one number for each example or loss; the task returns '
                + ', '.join(f'{name} {shape}' for name, shape in sorted(found.items()))
                + '. trainer.tasks:NextToken returns those that its `fields` name'
            )
        weights = outputs.get(cls._weights)
        weights = jnp.ones(loss.shape) if weights is None else weights
        weights = broadcast_weights(weights, loss.shape)
        # Selected, because a value of weight 0 may be NaN, and 0 x NaN is NaN.
        total = jnp.where(weights != 0, loss * weights, 0.0).sum()
        weights = weights.max(axis=tuple(range(count.ndim, weights.ndim)))
        return jnp.stack([total, (count * weights).sum()])

    def mean(self) -> float:
        """Returns the loss in nats per unit; NaN without units."""
        if not self.sums.ndim or not self.sums[1]:
            return float('nan')
        return float(self.sums[0] / self.sums[1])


@flax.struct.dataclass
class _PerplexityPerUnit(_LossPerUnit):
    def compute(self) -> float:
        """Returns exp of the mean; inf if it exceeds float64."""
        with np.errstate(all='ignore'):
            return float(np.exp(self.mean()))


@flax.struct.dataclass
class _BitsPerUnit(_LossPerUnit):
    def compute(self) -> float:
        """Returns the mean in bits."""
        return self.mean() / math.log(2)
