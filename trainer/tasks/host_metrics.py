# SPDX-License-Identifier: Apache-2.0
"""Metrics that need all examples at once, on the host: AUC, average precision, correlations.

Each function returns a `clu.metrics.CollectingMetric` class, for evaluations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, get_args

import clu.metrics
import numpy as np

from trainer.config.errors import UserError
from trainer.modules.shapes import describe
from trainer.tasks import scores as functions
from trainer.tasks.decisions import read_output, read_scored, read_weights
from trainer.tasks.scores import Average, MultiClass, check_average, check_multi_class
from trainer.tasks.sums import configure


def AUC(
    *,
    average: Average = 'macro',
    multi_class: MultiClass = 'ovr',
    skip_absent: bool = False,
    from_logits: bool = True,
    scores: str = 'logits',
    labels: str = 'labels',
    weights: str = 'weights',
) -> type[clu.metrics.CollectingMetric]:
    """Returns the class of a metric: the area under the ROC curve, exact over all examples.

    Several classes are compared by their probabilities.

    Args:
        average: over labels or classes: 'micro' pools them, 'macro' is their mean, 'weighted' by
            their number of examples, 'per_class' an array.
        multi_class: for several classes, 'ovr' compares each with the rest; 'ovo' each with each of
            the others, for the averages 'macro' and 'weighted'.
        skip_absent: whether means leave out labels without a positive or without a negative
            example; otherwise these are NaN.
        from_logits: whether scores of classes are logits, and not probabilities.
        scores: the task's output of scores, (batch, ..., classes) or the shape of the labels.
        labels: the task's output of labels: integers (batch, ...), or 0 and 1 (batch, ..., labels)
            for decisions. A negative label is not counted.
        weights: the task's output of weights, (batch,) or (batch, ...).
    """
    names = {'scores': scores, 'labels': labels, 'weights': weights}
    check_multi_class(multi_class, average)
    base = _AUC if multi_class == 'ovr' else _PairwiseAUC
    return _configure_ranking('AUC', base, average, skip_absent, from_logits, **names)


def AveragePrecision(
    *,
    average: Average = 'macro',
    skip_absent: bool = False,
    from_logits: bool = True,
    scores: str = 'logits',
    labels: str = 'labels',
    weights: str = 'weights',
) -> type[clu.metrics.CollectingMetric]:
    """Returns the class of a metric: the average precision, exact over all examples.

    The mean over positive examples of the precision at their score. The arguments are those of AUC;
    a label without a positive example counts as 0.
    """
    names = {'scores': scores, 'labels': labels, 'weights': weights}
    base = _AveragePrecision
    return _configure_ranking('AveragePrecision', base, average, skip_absent, from_logits, **names)


def Spearman(
    *, predictions: str = 'predictions', targets: str = 'targets', weights: str = 'weights'
) -> type[clu.metrics.CollectingMetric]:
    """Returns the class of a metric: the correlation of ranks, exact over all examples.

    Args:
        predictions: the task's output of predictions, (batch,) or (batch, 1).
        targets: the task's output of targets, in this shape.
        weights: the task's output of weights, (batch,).
    """
    names = {'predictions': predictions, 'targets': targets, 'weights': weights}
    return configure(_Spearman, 'Spearman', **names)


def Pearson(
    *, predictions: str = 'predictions', targets: str = 'targets', weights: str = 'weights'
) -> type[clu.metrics.CollectingMetric]:
    """Returns the class of a metric: the linear correlation.

    The arguments are those of Spearman.
    """
    names = {'predictions': predictions, 'targets': targets, 'weights': weights}
    return configure(_Pearson, 'Pearson', **names)


def _configure_ranking(
    name: str,
    base: type[_Ranking],
    average: Average,
    skip_absent: bool,
    from_logits: bool,
    **names: str,
) -> type[clu.metrics.CollectingMetric]:
    check_average(average, get_args(Average))
    settings = {'average': average, 'skip_absent': skip_absent, 'from_logits': from_logits}
    return configure(base, name, **settings, **names)


class _Ranking(clu.metrics.CollectingMetric):
    """Collects scores, labels and weights."""

    function: ClassVar[Callable[..., Any]]
    average: ClassVar[Average]
    skip_absent: ClassVar[bool]
    from_logits: ClassVar[bool]
    scores: ClassVar[str]
    labels: ClassVar[str]
    weights: ClassVar[str]

    @classmethod
    def from_model_output(cls, **outputs: Any) -> _Ranking:
        """Returns the arrays of one batch by name, each (batch, ...)."""
        found = read_scored(cls, outputs)
        parts = {'scores': found.scores, 'labels': found.labels, 'weights': found.weights}
        return cls(values={name: (x,) for name, x in parts.items()})

    def compute(self) -> Any:
        """Returns the score, a float or an array (classes,); NaN without examples."""
        found = super().compute() if self.values else {}
        if not found or not found['labels'].size:
            return float('nan')
        labels, weights = found['labels'], found['weights']
        scores = found['scores'].astype(np.float64)
        weights = weights.reshape(*weights.shape, *[1] * (labels.ndim - weights.ndim))
        weights = np.broadcast_to(weights, labels.shape)
        if scores.ndim > labels.ndim:
            labels, weights = labels.ravel(), weights.ravel()
            scores = _compare_classes(scores.reshape(len(labels), -1), self.from_logits)
        elif labels.ndim > 1:
            parts = (labels, scores, weights)
            labels, scores, weights = (x.reshape(-1, x.shape[-1]) for x in parts)
        named = {'average': self.average, 'skip_absent': self.skip_absent}
        return self.function(labels, scores, weights, **named)


class _AUC(_Ranking):
    function = staticmethod(functions.auc)


class _PairwiseAUC(_Ranking):
    function = staticmethod(functools.partial(functions.auc, multi_class='ovo'))

    @classmethod
    def from_model_output(cls, **outputs: Any) -> _Ranking:
        """Returns the arrays of one batch by name, each (batch, ...)."""
        found = read_scored(cls, outputs)
        if found.kind != 'multiclass':
            raise UserError(
                f"the metric {cls.__name__} with multi_class='ovo' compares classes, but "
                f'{cls.scores!r} is {describe(found.scores)} and {cls.labels!r} is '
                f'{describe(found.labels)}; leave multi_class out for decisions'
            )
        return super().from_model_output(**outputs)


class _AveragePrecision(_Ranking):
    function = staticmethod(functions.average_precision)


class _Correlation(clu.metrics.CollectingMetric):
    """Collects predictions, targets and weights."""

    function: ClassVar[Callable[..., float]]
    predictions: ClassVar[str]
    targets: ClassVar[str]
    weights: ClassVar[str]

    @classmethod
    def from_model_output(cls, **outputs: Any) -> _Correlation:
        """Returns the arrays of one batch by name, each (batch,)."""
        one = read_output(cls.__name__, cls.predictions, outputs)
        two = read_output(cls.__name__, cls.targets, outputs)
        if one.shape != two.shape or not one.ndim or one.size != one.shape[0]:
            raise UserError(
                f'the metric {cls.__name__}: {cls.predictions!r} is {describe(one)} and '
                f'{cls.targets!r} is {describe(two)}; expected one number for each example'
            )
        weights = read_weights(cls.__name__, cls.weights, outputs, two.ravel())
        parts = {'predictions': one.ravel(), 'targets': two.ravel(), 'weights': weights}
        return cls(values={name: (x,) for name, x in parts.items()})

    def compute(self) -> float:
        """Returns the correlation; NaN without examples."""
        if not self.values:
            return float('nan')
        found = super().compute()
        return self.function(found['targets'], found['predictions'], found['weights'])


class _Spearman(_Correlation):
    function = staticmethod(functions.spearman)


class _Pearson(_Correlation):
    function = staticmethod(functions.pearson)


def _compare_classes(scores: np.ndarray, from_logits: bool) -> np.ndarray:
    """Returns scores of classes that can be compared between examples."""
    if not from_logits:
        return scores
    # For two classes, the difference is monotonic in the probability, and does not round to 1.
    if scores.shape[1] == 2:
        difference = scores[:, 1] - scores[:, 0]
        return np.stack([-difference, difference], 1)
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
