# SPDX-License-Identifier: Apache-2.0
"""Scores that need all examples at once, as functions of numpy arrays.

They equal those of scikit-learn and scipy, in float64, and are exact for ties.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np

Average = Literal['micro', 'macro', 'weighted', 'per_class']
MultiClass = Literal['ovr', 'ovo']


def auc(
    labels: Any,
    scores: Any,
    weights: Any = None,
    *,
    average: Average = 'macro',
    skip_absent: bool = False,
    multi_class: MultiClass = 'ovr',
) -> Any:
    """Returns the area under the ROC curve: how often a positive scores higher than a negative.

    Args:
        labels: 0 or 1 (examples,) or (examples, labels), or integers (examples,) for scores of
            several classes. A negative label or NaN does not count.
        scores: (examples,), (examples, labels) or (examples, classes).
        weights: (examples,), or the shape of the labels; None weighs all equally.
        average: over labels or classes: 'micro' pools them, 'macro' is their mean, 'weighted' by
            their number of examples, 'per_class' an array.
        skip_absent: whether means leave out labels without a positive or without a negative
            example.
        multi_class: for several classes, 'ovr' compares each with the rest, and 'ovo' each with
            each of the others (Hand and Till 2001, https://doi.org/10.1023/A:1010920819831). That
            is a mean over pairs of classes: 'macro', or 'weighted' by their number of examples.

    Returns:
        A float; NaN if a label of the mean has no positive or no negative example. For 'per_class'
        an array (labels,).

    Raises:
        ValueError: if shapes do not fit, and for 'ovo' without classes or with another average.
    """
    check_multi_class(multi_class, average)
    if multi_class == 'ovo':
        return _compare_pairs(labels, scores, weights, average, skip_absent)
    return _average(_binary_auc, labels, scores, weights, average, skip_absent)


def average_precision(
    labels: Any,
    scores: Any,
    weights: Any = None,
    *,
    average: Average = 'macro',
    skip_absent: bool = False,
) -> Any:
    """Returns the average precision: the sum of (recall_n - recall_(n-1)) precision_n.

    Args:
        labels: as in `auc`.
        scores: as in `auc`.
        weights: as in `auc`.
        average: as in `auc`.
        skip_absent: as in `auc`.

    Returns:
        A float; 0 for a label without a positive example. For 'per_class' an array (labels,).

    Raises:
        ValueError: if shapes do not fit.
    """
    return _average(_binary_average_precision, labels, scores, weights, average, skip_absent)


def pearson(targets: Any, predictions: Any, weights: Any = None) -> float:
    """Returns the linear correlation of two arrays, NaN if one of them is constant.

    Args:
        targets: numbers (examples,) to predict.
        predictions: predicted numbers (examples,).
        weights: (examples,); None weighs all equally.

    Raises:
        ValueError: if shapes do not fit.
    """
    one, two, weights = _pairs(targets, predictions, weights)
    # Compared exactly, because a variance of rounding errors would not be 0.
    if not len(one) or (one == one[0]).all() or (two == two[0]).all():
        return float('nan')
    one = one - np.average(one, weights=weights)
    two = two - np.average(two, weights=weights)
    shared = (weights * one * two).sum()
    return float(shared / np.sqrt((weights * one**2).sum() * (weights * two**2).sum()))


def spearman(targets: Any, predictions: Any, weights: Any = None) -> float:
    """Returns the correlation of the ranks of two arrays; equal values have their mean rank.

    An example of weight 2 counts as two of weight 1.

    Args:
        targets: numbers (examples,) to predict.
        predictions: predicted numbers (examples,).
        weights: (examples,); None weighs all equally.

    Raises:
        ValueError: if shapes do not fit.
    """
    one, two, weights = _pairs(targets, predictions, weights)
    if np.isnan(one).any() or np.isnan(two).any():
        return float('nan')
    return pearson(_rank(one, weights), _rank(two, weights), weights)


def check_average(average: Any, known: Sequence[str]) -> None:
    """Checks the way in which a metric averages.

    Raises:
        ValueError: if it is not one of those that are known, naming them.
    """
    if average not in known:
        raise ValueError(f'average: expected one of {", ".join(map(repr, known))}, got {average!r}')


def check_multi_class(multi_class: Any, average: Any) -> None:
    """Checks how an AUC compares classes.

    Raises:
        ValueError: for an unknown way, or one that has no such average.
    """
    known = get_args(MultiClass)
    if multi_class not in known:
        raise ValueError(
            f'multi_class: expected {" or ".join(map(repr, known))}, got {multi_class!r}'
        )
    if multi_class == 'ovo' and average not in ('macro', 'weighted'):
        raise ValueError(
            "multi_class='ovo' is a mean over pairs of classes: expected average='macro' or "
            f"'weighted', got {average!r}"
        )


def _compare_pairs(
    labels: Any, scores: Any, weights: Any, average: Average, skip_absent: bool
) -> float:
    """Returns the mean over pairs of classes of the area within the examples of the two."""
    if np.ndim(scores) != np.ndim(labels) + 1:
        raise ValueError(
            f"multi_class='ovo' compares classes: expected labels [examples] and scores [examples, "
            f'classes], got {list(np.shape(labels))} and {list(np.shape(scores))}'
        )
    yes, scores, weights = _columns(labels, scores, weights)
    if yes.shape[1] == 1:  # Two classes are one pair.
        return _binary_auc(*(x.ravel() for x in (yes, scores, weights)))
    rows = [np.flatnonzero(column & (w != 0)) for column, w in zip(yes.T, weights.T, strict=True)]
    values, support = [], []
    for one, two in itertools.combinations(range(len(rows)), 2):
        if skip_absent and not (len(rows[one]) and len(rows[two])):
            continue
        both = np.concatenate([rows[one], rows[two]])
        areas = [_binary_auc(yes[both, i], scores[both, i], weights[both, i]) for i in (one, two)]
        values.append(sum(areas) / 2)
        support.append(weights[both, one].sum())
    if not values:
        return float('nan')
    return float(np.average(values, weights=support if average == 'weighted' else None))


def _average(
    function: Callable[..., float],
    labels: Any,
    scores: Any,
    weights: Any,
    average: Average,
    skip_absent: bool,
) -> Any:
    check_average(average, get_args(Average))
    labels, scores, weights = _columns(labels, scores, weights)
    if average == 'micro' or labels.shape[1] == 1:
        value = function(*(x.ravel() for x in (labels, scores, weights)))
        return np.array([value]) if average == 'per_class' else value
    columns = list(zip(labels.T, scores.T, weights.T, strict=True))
    values = np.array([function(*column) for column in columns])
    if average == 'per_class':
        return values
    support = np.array([w[y].sum() for y, _, w in columns])
    if skip_absent:
        absent = np.array([w[~y].sum() for y, _, w in columns])
        kept = (support > 0) & (absent > 0)
        values, support = values[kept], support[kept]
    if not len(values):
        return float('nan')
    if average == 'macro':
        return float(values.mean())
    values = np.where(support > 0, values, 0.0)
    return float(np.average(values, weights=support)) if support.sum() else 0.0


def _columns(labels: Any, scores: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns whether labels are positive (bool), scores and weights, each (examples, labels)."""
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    of_classes = scores.ndim == labels.ndim + 1
    if labels.ndim not in (1, 2) or scores.shape[: labels.ndim] != labels.shape or scores.ndim > 2:
        raise ValueError(
            f'labels of {list(labels.shape)} and scores of {list(scores.shape)}: expected equal '
            'shapes [examples] or [examples, labels], or labels [examples] and scores [examples, '
            'classes]'
        )
    given = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    if given.shape != labels.shape[: given.ndim]:
        raise ValueError(
            f'weights of {list(given.shape)} do not fit labels of {list(labels.shape)}'
        )
    counted = labels >= 0
    if labels.ndim == 1:
        counted, given = counted[:, None], given[:, None]
    given = np.where(counted, given.reshape(len(given), -1), 0.0)
    scores = scores.reshape(len(scores), -1)
    if of_classes and scores.shape[1] > 1:
        yes = labels[:, None] == np.arange(scores.shape[1])
    else:
        yes = labels.reshape(len(labels), -1) > 0.5
    # Two classes are one decision, and the second class is the positive one.
    if of_classes and scores.shape[1] == 2:
        yes, scores = yes[:, 1:], scores[:, 1:]
    return yes, scores, np.broadcast_to(given, yes.shape)


def _count_by_score(
    yes: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the weights of positives and negatives at each distinct score, ascending.

    None if a score is NaN.
    """
    counted = weights != 0
    yes, scores, weights = yes[counted], scores[counted], weights[counted]
    if np.isnan(scores).any():
        return None
    _, group = np.unique(scores, return_inverse=True)
    size = group.max(initial=-1) + 1
    return np.bincount(group, weights * yes, size), np.bincount(group, weights * ~yes, size)


def _binary_auc(yes: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    counts = _count_by_score(yes, scores, weights)
    if counts is None:
        return float('nan')
    right, wrong = counts
    pairs = right.sum() * wrong.sum()
    # A pair is a hit if its negative scores lower; equal scores are half a hit.
    hits = (right * (np.cumsum(wrong) - wrong / 2)).sum()
    return float(hits / pairs) if pairs else float('nan')


def _binary_average_precision(yes: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    counts = _count_by_score(yes, scores, weights)
    if counts is None or not weights.any():
        return float('nan')
    right, wrong = (x[::-1] for x in counts)
    if not right.sum():
        return 0.0
    found = np.cumsum(right)
    return float((right * found / (found + np.cumsum(wrong))).sum() / right.sum())


def _pairs(targets: Any, predictions: Any, weights: Any) -> tuple[np.ndarray, ...]:
    """Returns both arrays and the weights, float64 (examples,), without examples of weight 0."""
    one, two = np.asarray(targets, np.float64), np.asarray(predictions, np.float64)
    given = np.ones(one.shape) if weights is None else np.asarray(weights, np.float64)
    if one.ndim != 1 or not one.shape == two.shape == given.shape:
        raise ValueError(
            f'targets of {list(one.shape)}, predictions of {list(two.shape)} and weights of '
            f'{list(given.shape)}: expected equal shapes [examples]'
        )
    counted = given != 0
    return one[counted], two[counted], given[counted]


def _rank(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the rank of each value: the weight of smaller values plus half that of equal ones."""
    _, group = np.unique(values, return_inverse=True)
    mass = np.bincount(group, weights)
    return (np.cumsum(mass) - mass / 2)[group]
