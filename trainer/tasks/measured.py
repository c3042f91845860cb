# SPDX-License-Identifier: Apache-2.0
"""Computed metrics: numbers for rows, arrays for files. And checks of metrics before training."""

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
from trainer.observe.summaries import Summary
from trainer.observe.summary_files import check_name

# Errors that do not depend on the data. Others, such as ZeroDivisionError, may only mean that a
# metric has seen no data yet.
_BROKEN = (TypeError, AttributeError, NameError, NotImplementedError, ImportError)


class MetricValues(dict[str, float]):
    """Numbers by flat name, as in a row of metrics, and arrays, which a row cannot have.

    Attributes:
        arrays: values that do not have exactly one element, by flat name.
        summaries: texts, images and other summaries, by flat name.
    """

    def __init__(self, computed: Mapping[Any, Any] | None = None):
        """Adds computed metrics: see `add`."""
        super().__init__()
        self.arrays: dict[str, np.ndarray] = {}
        self.summaries: dict[str, Summary] = {}
        for name, value in (computed or {}).items():
            self.add(str(name), value)

    def add(self, name: str, value: Any) -> None:
        """Adds a value under a name; the values of a (nested) dict under 'name/key'.

        Args:
            name: name with '/' between its parts.
            value: a number, an array, a summary, or a dict of these. An array of one element is a
                number.

        Raises:
            UserError: if the value is none of these, the name is already taken, or that of a
                summary cannot be the name of a file.
        """
        if isinstance(value, Mapping):
            for key, each in value.items():
                self.add(f'{name}/{key}', each)
            return
        # 'a/b' and the entry 'b' of a dict 'a' have the same flat name.
        if name in self or name in self.arrays or name in self.summaries:
            raise UserError(f'two values of a row of metrics are named {name!r}; rename one')
        if isinstance(value, Summary):
            check_name(name)
            self.summaries[name] = value
            return
        if not isinstance(value, (int, float)):
            array = _as_array(name, value)
            if array.size != 1:
                self.arrays[name] = array
                return
            value = array.item()
        # JSON would have `true`, which is not a number; numpy's floats print as 'np.float64(1)'.
        self[name] = int(value) if isinstance(value, int) else float(value)

    def update_with(self, other: MetricValues, prefix: str = '') -> None:
        """Adds all values of `other`, with a prefix to their names."""
        for name, value in {**other, **other.arrays, **other.summaries}.items():
            self.add(prefix + name, value)


def _as_array(name: str, value: Any) -> np.ndarray:
    """Returns a numeric array in one of numpy's own dtypes."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        kind, is_lone = value.dtype, np.size(value) == 1
        if any(jnp.issubdtype(kind, each) for each in (np.bool_, np.integer, np.floating)):
            # Kind 'V' is bfloat16 or another dtype of ml_dtypes, which .npz files cannot store.
            return np.asarray(value, np.float32) if kind.kind == 'V' else np.asarray(value)
        # Complex arrays can go to a file, but a row cannot have a complex number.
        if jnp.issubdtype(kind, np.complexfloating) and not is_lone:
            return np.asarray(value)
    what = describe(value) if hasattr(value, 'shape') else type(value).__name__
    raise UserError(
        f'the metric {name!r} computes {what}; expected a number, an array of numbers, or a dict '
        'of these. For several values return a dict, or an array made with jnp.stack'
    )


def average_members(members: Sequence[MetricValues], counted: Iterable[int] = ()) -> MetricValues:
    """Returns the mean of each value over the members, and 'member_<i>/<name>' for each of them.

    Values that some members lack, or that differ in shape, have no mean.

    Args:
        members: the values of each member.
        counted: indices of the members that count in the means; empty for all.
    """
    averaged = [members[index] for index in counted] or members
    row = MetricValues()
    for name in averaged[0]:
        if all(name in each for each in averaged):
            row.add(name, float(np.mean([each[name] for each in averaged])))
    for name, first in averaged[0].arrays.items():
        arrays = [each.arrays.get(name) for each in averaged]
        if all(x is not None and x.shape == first.shape for x in arrays):
            # In float64: integer counts would overflow, and half precision would round the sum.
            row.add(name, np.mean([np.asarray(x, np.float64) for x in arrays], axis=0))
    # Of all members, including those that do not count in the means.
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
    # clu's collections have bookkeeping fields beside their metrics.
    return [(name, x) for name, x in named if not compat.is_reduction_counter(name)]


def find_failing_metric(
    collection: type[clu.metrics.Collection], outputs: Mapping[str, Any]
) -> str | None:
    """Returns the name of the first metric that these outputs of a task make fail, or None."""
    # A collection does not say which of its metrics has failed, so each is tried alone.
    for name, kind in collection.__annotations__.items():
        if hasattr(kind, 'from_model_output'):
            try:
                kind.from_model_output(**outputs)
            except Exception:
                return name
    return None


def check_accumulates(empty: Any, new: Any) -> None:
    """Checks that metrics keep their shapes when they are merged.

    Metrics are part of the donated state, whose shapes must not change from step to step.

    Args:
        empty: tree of empty metrics, arrays or their shapes.
        new: the same tree for one batch, arrays or their shapes.

    Raises:
        UserError: naming the metric that does not.
    """
    for (name, before), (_, one) in zip(metrics_by_name(empty), metrics_by_name(new), strict=True):
        after = jax.eval_shape(lambda a, b: a.merge(b), before, one)
        grown = changes(_shapes(before), _shapes(after))
        if grown:
            raise UserError(
                f'the metric {name!r} cannot accumulate on the devices: the shapes that its '
                f'merge() returns differ from those of its empty() ({grown})'
            )


def check_computes(metrics: Any) -> None:
    """Checks, from shapes alone, that the result of each metric fits into a row or a file.

    A metric may fail to compute without data, but not for a reason that does not depend on the
    data. So it is tried with zeros and with ones, and must fail for both to be an error.

    Args:
        metrics: tree of metrics, arrays or their shapes.

    Raises:
        UserError: naming the metric that does not.
    """
    for name, metric in metrics_by_name(metrics):

        def compute(x: Any, name: str = name) -> MetricValues:
            return MetricValues({name: x.compute()})

        errors = _errors(compute, metric)
        if len(errors) == 2 and all(isinstance(error, _BROKEN) for error in errors):
            kind = type(errors[0]).__name__
            raise UserError(
                f'the metric {name!r} cannot be computed for any data: {kind}: {errors[0]}. '
                'Fix its compute(), or remove the metric'
            ) from errors[0]
        _raise_if_sure(errors)


def compute_on_trial(compute: Callable[[Any], MetricValues], metrics: Any) -> MetricValues | None:
    """Returns `compute(metrics)` for metrics that are all zeros or all ones; None if both fail.

    Args:
        compute: computes the values of a tree of metrics.
        metrics: such a tree, arrays or their shapes.

    Raises:
        UserError: that of `compute`, if it raises one for both.
    """
    results: list[MetricValues] = []
    _raise_if_sure(_errors(lambda x: results.append(compute(x)), metrics))
    return results[0] if results else None


def _errors(act: Callable[[Any], object], metrics: Any) -> list[Exception]:
    """Returns the errors of `act` with zeros and then ones; stops at the first success."""
    errors: list[Exception] = []
    for fill in (np.zeros, np.ones):
        try:
            filled = jax.tree.map(lambda x, fill=fill: fill(x.shape, x.dtype), metrics)
        except TypeError:
            return []  # Random keys, which numpy does not support.
        try:
            # 0 / 0 is expected here, and its warning would only confuse.
            with np.errstate(all='ignore'), warnings.catch_warnings(action='ignore'):
                act(filled)
            break
        except Exception as error:
            errors.append(error)
    return errors


def _raise_if_sure(errors: Sequence[Exception]) -> None:
    """Raises the first error if zeros and ones both gave a UserError."""
    if len(errors) == 2 and all(isinstance(error, UserError) for error in errors):
        raise errors[0]


def _shapes(tree: Any) -> Any:
    """Returns shapes without dtypes: a change of dtype only costs another compilation."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), tree)
