# SPDX-License-Identifier: Apache-2.0
"""Metrics that a config adds to those of a task."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from typing import Any

import clu.metrics

from trainer.config.advice import public_name
from trainer.tasks.metrics import mean_collection


def add_to_means(
    own: Sequence[str], extra: Mapping[str, type[clu.metrics.Metric]]
) -> type[clu.metrics.Collection]:
    """Returns the collection of a task: weighted means of its outputs, and extra metrics.

    Raises:
        ValueError: if a name is not an identifier or is reserved, or a value is not a metric class.
    """
    for name, metric in extra.items():
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f'extra_metrics: expected Python identifiers as names, got {name!r}')
        if name in own:
            raise ValueError(f'extra_metrics: the task has a metric {name!r}; choose another name')
        if not (isinstance(metric, type) and issubclass(metric, clu.metrics.Metric)):
            raise ValueError(
                f'extra_metrics.{name}: expected a metric, such as '
                f"dict(target='trainer.metrics:F1'), got {_describe(metric)}"
            )
    return mean_collection(tuple(own), others=tuple(extra.items()))


def _describe(value: Any) -> str:
    if getattr(value, '__module__', '').startswith('trainer.') and callable(value):
        return f"the function {public_name(value)}: name it by 'target', not by 'ref'"
    return f'{type(value).__name__} {value!r}'
