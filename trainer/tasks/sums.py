# SPDX-License-Identifier: Apache-2.0
"""Metrics that are computed from weighted sums, whose shape depends on the first batch."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from trainer.tasks.metrics import is_metric

M = TypeVar('M', bound=clu.metrics.Metric)


@flax.struct.dataclass
class Sums(clu.metrics.Metric):
    """Sums over all examples, in float32 with their rounding errors.

    A float32 alone stops counting at 2^24. Together with the errors of its additions, a count is
    exact up to 2^47, if it is below 2^24 in each batch. A subclass defines the summands
    (`sum_batch`), and `compute` runs on the host.

    Attributes:
        total: the sums, of any shape.
        rest: the rounding errors of the additions to `total`, in its shape.
    """

    total: jax.Array
    rest: jax.Array

    @classmethod
    def empty(cls) -> Sums:
        """Returns scalar zeros, to which any sums can be added: see `empty_like`."""
        return cls(total=jnp.zeros((), jnp.float32), rest=jnp.zeros((), jnp.float32))

    @classmethod
    def from_model_output(cls, **outputs: Any) -> Sums:
        """Returns the sums of one batch.

        Args:
            **outputs: the outputs of the task, by name.

        Raises:
            UserError: if an output is missing, or its shape does not fit.
        """
        total = cls.sum_batch(outputs)
        return cls(total=total, rest=jnp.zeros_like(total))

    @classmethod
    def sum_batch(cls, outputs: dict[str, Any]) -> jax.Array:
        """Returns the sums of one batch, float32."""
        raise NotImplementedError

    def merge(self, other: Sums) -> Sums:
        """Returns the sums over both."""
        total = self.total + other.total
        # The rounding error, which is a float32 itself (Knuth, TAOCP 2, section 4.2.2).
        added = total - self.total
        lost = (self.total - (total - added)) + (other.total - added)
        rest = self.rest + other.rest + lost
        # As much of it as fits goes to the total; otherwise `rest` would stop counting, too.
        whole = total + rest
        return type(self)(total=whole, rest=rest - (whole - total))

    @property
    def sums(self) -> np.ndarray:
        """The sums in float64, on the host."""
        return np.asarray(self.total, np.float64) + np.asarray(self.rest, np.float64)


def empty_like(empty: Any, new: Any) -> Any:
    """Returns empty accumulators in which sums have the shapes of those of a batch.

    Args:
        empty: tree of empty metrics.
        new: the same tree for one batch, arrays or their shapes.
    """

    def fit(before: Any, one: Any) -> Any:
        if isinstance(before, clu.metrics.Collection):
            fields = {name: fit(each, getattr(one, name)) for name, each in vars(before).items()}
            return type(before)(**fields)
        if isinstance(before, Sums):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
        return before

    return jax.tree.map(fit, empty, new, is_leaf=is_metric)


def configure(base: type[M], name: str, **settings: Any) -> type[M]:
    """Returns a subclass of a metric with some of its class attributes set.

    Cached, because the class is part of the pytree type of a state.

    Args:
        base: class of the metric.
        name: name of the subclass, for messages.
        **settings: class attributes, hashable.
    """
    hashable: Any = base  # The type annotations of flax.struct do not say so.
    return _make_class(hashable, name, tuple(settings.items()))


@functools.cache
def _make_class(base: Any, name: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    attributes = {'__module__': 'trainer.metrics', **dict(settings)}
    return flax.struct.dataclass(type(name, (base,), attributes))
