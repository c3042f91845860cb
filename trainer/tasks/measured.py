# SPDX-License-Identifier: Apache-2.0
"""Computed metrics (numbers for rows, arrays for files), and checks of them before training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np

from trainer import compat
from trainer.config.errors import UserError
from trainer.modules.shapes import changes, describe

# Errors of the code itself, for any values. Other errors may be due to a metric without data.
_BROKEN = (TypeError, AttributeError, NameError, NotImplementedError, ImportError)


class Measured(dict[str, float]):
    """Numbers by flat name, as in a row of metrics, and arrays.

    Attributes:
        arrays: values that do not have exactly one element, by flat name.
    """

    def __init__(self, computed: Mapping[Any, Any] | None = None):
        """Takes computed metrics: see `add`."""
        super().__init__()
        self.arrays: dict[str, np.ndarray] = {}
        for name, value in (computed or {}).items():
            self.add(str(name), value)

    def add(self, name: str, value: Any) -> None:
        """Adds a value under a name; the values of a (nested) dict under 'name/key'.

        Args:
            name: flat name.
            value: a number, an array or a dict. An array of one element is a number.

        Raises:
            UserError: if the value is none of these, or the name is already taken.
        """
        if isinstance(value, Mapping):
            for key, each in value.items():
                self.add(f'{name}/{key}', each)
            return
        if name in self or name in self.arrays:
            raise UserError(f'two values are named {name!r} in a row of metrics; rename one')
        if not isinstance(value, (int, float)):
            array = _as_array(name, value)
            if array.size != 1:
                self.arrays[name] = array
                return
            value = array.item()
        self[name] = int(value) if isinstance(value, bool) else value

    def update_with(self, other: Measured, prefix: str = '') -> None:
        """Adds all values of another one, with a prefix to their names."""
        for name, value in {**other, **other.arrays}.items():
            self.add(prefix + name, value)

    def with_prefix(self, prefix: str) -> Measured:
        """Returns a copy with a prefix to the names of numbers; arrays keep their names."""
        result = Measured({prefix + name: value for name, value in self.items()})
        result.arrays = self.arrays
        return result


def _as_array(name: str, value: Any) -> np.ndarray:
    """Returns a numeric array in a dtype that numpy itself knows."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        kind, is_lone = value.dtype, np.size(value) == 1
        # Rows cannot have complex numbers, and numpy files cannot have bfloat16.
        if any(jnp.issubdtype(kind, each) for each in (np.bool_, np.integer, np.floating)):
            return np.asarray(value, np.float32) if kind.kind == 'V' else np.asarray(value)
        if jnp.issubdtype(kind, np.complexfloating) and not is_lone:
            return np.asarray(value)
    what = describe(value) if hasattr(value, 'shape') else type(value).__name__
    raise UserError(
        f'the metric {name!r} computes {what}; expected a number, an array of numbers, or a dict '
        'of these. For several values return a dict, or an array made with jnp.stack'
    )


def average_members(members: Sequence[Measured], counted: Iterable[int] = ()) -> Measured:
    """Returns the mean of each value over the members, and 'member_<i>/<name>' for each of them.

    Values that some members lack, or that differ in shape, have no mean.

    Args:
        members: the values of each.
        counted: indices of the members that count in the means; empty for all.
    """
    those = [members[index] for index in counted] or members
    row = Measured()
    for name in those[0]:
        if all(name in each for each in those):
            row.add(name, float(np.mean([each[name] for each in those])))
    for name, first in those[0].arrays.items():
        every = [each.arrays.get(name) for each in those]
        if all(x is not None and x.shape == first.shape for x in every):
            row.add(name, np.mean([np.asarray(x, np.float64) for x in every], axis=0))
    for index, each in enumerate(members):
        row.update_with(each, f'member_{index}/')
    return row


def is_member_name(name: str) -> bool:
    """Whether a name belongs to a value of a single ensemble member."""
    return re.match(r'member_\d+/', name) is not None


# ---- before the first step ---------------------------------------------------------------------


def metrics_by_name(tree: Any) -> list[tuple[str, Any]]:
    """Returns the metrics of a tree, including those of its collections, with their names."""
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, clu.metrics.Metric)
    )
    named = ((jax.tree_util.keystr(path[-1:], simple=True), x) for path, x in leaves)
    return [(name, x) for name, x in named if not compat.is_reduction_counter(name)]


def check_accumulates(empty: Any, new: Any) -> None:
    """Checks that metrics keep their shapes however many batches they see.

    Args:
        empty: tree of metrics that have seen nothing.
        new: the same tree, of one batch; arrays or their shapes, like `empty`.

    Raises:
        UserError: naming the metric that does not.
    """
    for (name, before), (_, one) in zip(metrics_by_name(empty), metrics_by_name(new), strict=True):
        if isinstance(before, clu.metrics.CollectingMetric):
            raise UserError(
                f'the metric {name!r} is a clu.metrics.CollectingMetric: it gathers all examples '
                'on the host and cannot accumulate on the devices, where metrics are arrays of '
                'fixed shape. Use one that accumulates sums or counts, such as the hits above each '
                'of a hundred thresholds'
            )
        after = jax.eval_shape(lambda a, b: a.merge(b), before, one)
        grown = changes(_shapes(before), _shapes(after))
        if grown:
            raise UserError(
                f'the metric {name!r} cannot accumulate on the devices: its merge() returns '
                f'shapes other than those of its empty() ({grown})'
            )


def check_computes(metrics: Any) -> None:
    """Checks that the result of each metric can be written to a row or a file, from shapes alone.

    Without data, a metric may fail to compute, but not for a reason that is independent of the
    data. So it is tried with zeros, and then with ones.

    Args:
        metrics: tree of metrics, arrays or their shapes.

    Raises:
        UserError: naming the metric that does not.
    """
    for name, metric in metrics_by_name(metrics):

        def compute(x: Any, name: str = name) -> Measured:
            return Measured({name: x.compute()})

        errors = _errors(compute, metric)
        if len(errors) == 2 and all(isinstance(error, _BROKEN) for error in errors):
            kind = type(errors[0]).__name__
            raise UserError(
                f'the metric {name!r} cannot be computed, whatever the data: {kind}: {errors[0]}. '
                'Fix its compute(), or remove the metric'
            ) from errors[0]
        _raise_if_sure(errors)


def compute_on_trial(compute: Callable[[Any], Measured], metrics: Any) -> Measured | None:
    """Returns `compute` of metrics that are all zeros or all ones, None if both fail.

    Args:
        compute: of a tree of metrics.
        metrics: such a tree, arrays or their shapes.

    Raises:
        UserError: that of `compute`, if either raises one.
    """
    found: list[Measured] = []
    _raise_if_sure(_errors(lambda x: found.append(compute(x)), metrics))
    return found[0] if found else None


def _errors(act: Callable[[Any], object], metrics: Any) -> list[Exception]:
    """Returns the errors of `act` with zeros and then ones; stops at the first success."""
    errors: list[Exception] = []
    for fill in (np.zeros, np.ones):
        try:
            filled = jax.tree.map(lambda x, fill=fill: fill(x.shape, x.dtype), metrics)
        except TypeError:
            return []  # Random keys, which numpy does not support.
        try:
            with np.errstate(all='ignore'), warnings.catch_warnings(action='ignore'):
                act(filled)
            break
        except Exception as error:
            errors.append(error)
    return errors


def _raise_if_sure(errors: Sequence[Exception]) -> None:
    if len(errors) == 2 and all(isinstance(error, UserError) for error in errors):
        raise errors[0]


def _shapes(tree: Any) -> Any:
    """Returns shapes without dtypes: a change of dtype only costs another compilation."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), tree)
