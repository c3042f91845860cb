# SPDX-License-Identifier: Apache-2.0
"""Metrics that accumulate on the devices: weighted means, last values and exact counts.

They are `clu.metrics.Metric`s. `clu.metrics.Average` has a mask of 0 or 1 and counts examples in
int32; `WeightedMean` also takes weights such as 0.5.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.errors import UserError
from trainer.parallel.host import fetch


@flax.struct.dataclass
class WeightedMean(clu.metrics.Metric):
    """sum(weight x value) / sum(weight), in float32.

    Attributes:
        total: scalar, the weighted sum so far.
        weight: scalar, the sum of the weights so far.
    """

    total: jax.Array
    weight: jax.Array

    @classmethod
    def empty(cls) -> WeightedMean:
        """Returns the mean of nothing, whose `compute()` is NaN."""
        return cls(total=jnp.zeros((), jnp.float32), weight=jnp.zeros((), jnp.float32))

    # Names of the output that is averaged and of the output with its weights. Class variables,
    # because clu creates metrics from classes, and a field would be part of the state.
    _values: ClassVar[str] = 'values'
    _weights: ClassVar[str] = 'weights'

    @classmethod
    def from_model_output(
        cls, values: Any = None, weights: Any = None, **outputs: Any
    ) -> WeightedMean:
        """Returns the metric of one batch.

        Args:
            values: (batch, ...) or a scalar.
            weights: (batch,) or the shape of `values`; None counts every value once. A value of
                weight 0 is ignored even where it is not finite. If they have more dimensions than
                the values, as weights of tokens beside values of whole sequences, a value counts by
                the largest of its weights.
            **outputs: outputs of the model by name: see `from_output`.

        Raises:
            ValueError: if the weights do not fit the values.
            UserError: the same for a named output.
        """
        outputs.update(values=values, weights=weights)
        values, weights = outputs[cls._values], outputs[cls._weights]
        try:
            values = jnp.asarray(values, jnp.float32)
            if weights is None:
                return cls(total=values.sum(), weight=jnp.float32(values.size))
            if 0 < values.ndim < weights.ndim:
                weights = weights.max(axis=tuple(range(values.ndim, weights.ndim)))
            weights = broadcast_weights(weights, values.shape)
        except (TypeError, ValueError) as error:
            if cls._values == 'values':
                raise
            raise UserError(
                f'the metric {cls._values!r} of the task: expected an array with one value for '
                f'each example, as the loss has them ({error})'
            ) from error
        # Selected, because 0 x NaN is NaN.
        total = jnp.where(weights != 0, values * weights, 0.0).sum()
        return cls(total=total, weight=weights.sum())

    @classmethod
    def from_output(cls, name: str, weighted_by: str = 'weights') -> type[WeightedMean]:
        """Returns the metric class that averages the output `name` by the output `weighted_by`."""

        @flax.struct.dataclass
        class FromOutput(WeightedMean):
            """Weighted mean of one named output."""

            _values: ClassVar[str] = name
            _weights: ClassVar[str] = weighted_by

        return FromOutput

    def merge(self, other: WeightedMean) -> WeightedMean:
        """Returns the mean over both."""
        # Sums are merged and divided only in `compute`, so that the mean over batches of different
        # weights is exact.
        return type(self)(total=self.total + other.total, weight=self.weight + other.weight)

    def compute(self) -> jax.Array:
        """Returns the scalar mean; NaN of values whose weights are all 0."""
        # On the host, numpy would warn of it.
        with np.errstate(invalid='ignore'):
            return self.total / self.weight


@flax.struct.dataclass
class Last(clu.metrics.Metric):
    """The value of the last step, for quantities whose mean over steps means little (norms)."""

    value: jax.Array

    @classmethod
    def empty(cls) -> Last:
        """Returns the metric of no step, whose `compute()` is NaN."""
        return cls(value=jnp.full((), jnp.nan, jnp.float32))

    @classmethod
    def from_model_output(cls, value: jax.Array, **_: Any) -> Last:
        """Returns the metric of one scalar."""
        return cls(value=jnp.asarray(value, jnp.float32))

    def merge(self, other: Last) -> Last:
        """Returns the newer of the two, `other`."""
        return other

    def compute(self) -> jax.Array:
        """Returns the scalar."""
        return self.value


@flax.struct.dataclass
class Count(clu.metrics.Metric):
    """An exact int32 count of the examples of an evaluation."""

    count: jax.Array

    @classmethod
    def empty(cls) -> Count:
        """Returns a count of 0."""
        # In float32, adding 1 would change nothing from 2^24 on.
        return cls(count=jnp.zeros((), jnp.int32))

    @classmethod
    def from_model_output(cls, mask: jax.Array, **_: Any) -> Count:
        """Returns the number of true elements of `mask`."""
        return cls(count=jnp.sum(mask, dtype=jnp.int32))

    def merge(self, other: Count) -> Count:
        """Returns the sum."""
        return type(self)(count=self.count + other.count)

    def compute(self) -> jax.Array:
        """Returns the scalar count."""
        return self.count


def is_metric(node: Any) -> bool:
    """Whether a node of a metrics tree is a metric or a collection of them."""
    return isinstance(node, (clu.metrics.Metric, clu.metrics.Collection))


def merge_metrics(old: Any, new: Any) -> Any:
    """Merges two trees of metrics of the same structure."""
    before, structure = jax.tree.flatten(old, is_leaf=is_metric)
    other: Any
    after, other = jax.tree.flatten(new, is_leaf=is_metric)
    if structure != other:
        raise ValueError(f'the names of the metrics changed: {other} after {structure}')
    return jax.tree.unflatten(structure, [a.merge(b) for a, b in zip(before, after, strict=True)])


def broadcast_weights(weights: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns float32 weights of `shape`; per-example weights are repeated within the example.

    Raises:
        ValueError: if the leading dimensions differ.
    """
    if weights.shape != shape[: weights.ndim]:
        raise ValueError(f'weights of shape {weights.shape} do not fit values of shape {shape}')
    weights = weights.astype(jnp.float32).reshape(
        weights.shape + (1,) * (len(shape) - weights.ndim)
    )
    return jnp.broadcast_to(weights, shape)


def non_finite_names(metrics: Any) -> list[str]:
    """Returns the names of the means in a tree of metrics whose sum is not finite.

    Not of those whose mean is not finite: the mean of no examples is NaN, which is not a failure.
    """
    leaves = jax.tree_util.tree_leaves_with_path(
        fetch(metrics), is_leaf=lambda x: isinstance(x, WeightedMean)
    )
    return [
        jax.tree_util.keystr(path[-1:], simple=True)
        for path, x in leaves
        if isinstance(x, WeightedMean) and not np.isfinite(x.total).all()
    ]


@functools.cache
def mean_collection(
    names: tuple[str, ...],
    losses: tuple[str, ...] = (),
    others: tuple[tuple[str, type[clu.metrics.Metric]], ...] = (),
) -> type[clu.metrics.Collection]:
    """Returns the collection class with a weighted mean of each named output.

    Cached, because the class is part of the pytree type of a state: two classes for the same names
    would be different structures.

    Args:
        names: outputs that are averaged by the output 'weights'.
        losses: names of losses: `<name>_loss` is averaged by `<name>_weights`.
        others: names and classes of other metrics.
    """
    means: dict[str, type[clu.metrics.Metric]] = {
        name: WeightedMean.from_output(name) for name in names
    }
    for name in losses:
        means[f'{name}_loss'] = WeightedMean.from_output(f'{name}_loss', f'{name}_weights')
    return clu.metrics.Collection.create(**means, **dict(others))
