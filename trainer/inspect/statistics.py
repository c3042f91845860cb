# SPDX-License-Identifier: Apache-2.0
"""Statistics of captured arrays: scalars, a histogram, or the first examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainer.modules.model_view import param_path
from trainer.modules.recorder import is_float
from trainer.observe.summaries import Histogram

BINS = 30


def summary(x: jax.Array) -> dict[str, jax.Array]:
    """Returns float32 scalars: statistics of the finite values, shares of zeros and non-finite."""
    # First of all: sums in half precision overflow, and lose small values.
    x = x.astype(jnp.float32)
    finite = jnp.isfinite(x)
    count = jnp.sum(finite)
    mean = jnp.sum(jnp.where(finite, x, 0.0)) / count
    # Two passes: the mean of the squares minus the square of the mean loses all digits if the mean
    # is large.
    square = jnp.sum(jnp.where(finite, (x - mean) ** 2, 0.0)) / count
    return {
        'mean': mean,
        'std': jnp.sqrt(square),
        # `initial` gives an empty array a minimum, which would otherwise be an error.
        'min': jnp.min(jnp.where(finite, x, jnp.inf), initial=jnp.inf),
        'max': jnp.max(jnp.where(finite, x, -jnp.inf), initial=-jnp.inf),
        'zeros': jnp.mean(x == 0, dtype=jnp.float32),
        'nonfinite': jnp.mean(~finite, dtype=jnp.float32),
    }


def bin_counts(x: jax.Array) -> jax.Array:
    """Returns the number of finite values in each bin between their minimum and maximum."""
    x = x.astype(jnp.float32).ravel()
    finite = jnp.isfinite(x)
    numbers = summary(x)
    width = (numbers['max'] - numbers['min']) / BINS
    # If all values are equal the width is 0, and they all go to the first bin.
    index = jnp.where(finite, x - numbers['min'], 0.0) / jnp.where(width > 0, width, 1.0)
    bins = jnp.clip(index.astype(jnp.int32), 0, BINS - 1)  # The maximum is in the last bin.
    # Non-finite values add 0, in whatever bin they are.
    return jnp.zeros(BINS, jnp.float32).at[bins].add(finite)


def make_measure(what: frozenset[str], rows: int) -> Callable[[jax.Array], dict[str, Any]]:
    """Returns a function that measures an array.

    Args:
        what: some of 'summary', 'histogram' and 'file'.
        rows: number of examples of an array that go into a file.
    """

    def measure(x: jax.Array) -> dict[str, Any]:
        measured: dict[str, Any] = {'summary': summary(x)} if what - {'file'} else {}
        if 'histogram' in what:
            measured['counts'] = bin_counts(x)
        if 'file' in what:
            measured['examples'] = (x[:rows] if x.ndim else x).astype(jnp.float32)
        return measured

    return measure


def histogram(measured: Mapping[str, Any]) -> Histogram:
    """Returns the histogram of a measured array, on the host."""
    numbers = {name: float(value) for name, value in measured['summary'].items()}
    return Histogram.from_counts(
        measured['counts'],
        low=numbers['min'],
        high=numbers['max'],
        mean=numbers['mean'],
        std=numbers['std'],
    )


def float_leaves(tree: Any) -> Iterator[tuple[str, jax.Array]]:
    """Yields (path, array) for each float array in a tree; the path of a lone array is ''."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if is_float(leaf):
            yield param_path(path), leaf
