# SPDX-License-Identifier: Apache-2.0
"""Metrics that need all examples at once (`clu.metrics.CollectingMetric`), such as an AUC.

The devices compute the arrays that such a metric collects from each batch. The host keeps those of
all batches, and computes the value at the end of an evaluation.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import clu.metrics
import flax.struct
import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.modules.shapes import describe

Collecting = tuple[tuple[str, type[clu.metrics.CollectingMetric]], ...]


def split_collecting(
    metrics: type[clu.metrics.Collection] | None,
) -> tuple[type[clu.metrics.Collection] | None, Collecting]:
    """Splits a collection into a part that accumulates on the devices, and collecting metrics."""
    written = getattr(metrics, '__annotations__', {})
    kinds = _resolve_texts(metrics, written)
    collecting = {name: kind for name, kind in kinds.items() if _is_collecting(kind)}
    if not collecting and kinds == written:
        return metrics, ()
    assert metrics is not None
    if not collecting:
        # A subclass, so that methods of the user's own remain.
        body = {'__annotations__': dict(kinds), '__module__': metrics.__module__}
        return flax.struct.dataclass(type(metrics.__name__, (metrics,), body)), ()
    if metrics.compute is not clu.metrics.Collection.compute:
        raise UserError(
            f'{metrics.__name__} has a compute() of its own, which cannot see '
            f'{", ".join(collecting)}: a CollectingMetric is computed on the host, apart from the '
            'others. Move the CollectingMetric to another collection, or compute its value itself'
        )
    rest = {name: kind for name, kind in kinds.items() if name not in collecting}
    return clu.metrics.Collection.create(**rest), tuple(collecting.items())


def _resolve_texts(metrics: Any, written: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns annotations as classes.

    With `from __future__ import annotations` they are strings, which clu does not resolve.
    """
    if not any(isinstance(kind, str) for kind in written.values()):
        return written
    try:
        hints = typing.get_type_hints(metrics)
    except Exception:  # The string may be any expression of the user.
        return written
    return {name: hints[name] for name in written}


def _is_collecting(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, clu.metrics.CollectingMetric)


@contextlib.contextmanager
def explain_missing_output(name: str, outputs: Iterable[str]) -> Iterator[None]:
    """Explains the error of a metric that collects an output that the task does not return."""
    try:
        yield
    except KeyError as error:
        have = ', '.join(sorted({'loss', 'mask', 'weights', *outputs}))
        raise UserError(
            f'the metric {name!r} collects {error}, which the task does not return; it returns '
            f'{have}'
        ) from error


def collected_arrays(
    name: str, metric: clu.metrics.CollectingMetric, size: int
) -> dict[str, jax.Array]:
    """Returns the arrays that a metric has collected from a batch, by name, each (batch, ...).

    Args:
        name: name of the metric, for messages.
        metric: the metric of one batch.
        size: number of examples of the batch.

    Raises:
        UserError: if dimension 0 of an array is not the batch.
    """
    # clu keeps a tuple with one array for each batch.
    arrays = {key: parts[0] for key, parts in metric.values.items()}
    for key, x in arrays.items():
        # The host removes padding by example.
        if x.shape[:1] != (size,):
            raise UserError(
                f'the metric {name!r} collects {key!r}, which is {describe(x)}; expected one entry '
                f'for each of the {size} examples of a batch'
            )
    return arrays


def compute_collected(
    kind: type[clu.metrics.CollectingMetric], arrays: Mapping[str, np.ndarray]
) -> Any:
    """Returns the value of a metric from the arrays of all examples."""
    return kind(values={name: (x,) for name, x in arrays.items()}).compute()
