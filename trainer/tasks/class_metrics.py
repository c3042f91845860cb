# SPDX-License-Identifier: Apache-2.0
"""Metrics of decisions that accumulate on the devices: F1, confusion matrix, calibration error.

Each function returns a metric class, for a collection of `clu.metrics`. The values equal those of
scikit-learn where it has the metric.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.errors import UserError
from trainer.tasks.decisions import Decisions, decide, read_scored
from trainer.tasks.metrics import broadcast_weights
from trainer.tasks.scores import check_average
from trainer.tasks.sums import Sums, configure

Average = Literal['binary', 'micro', 'macro', 'weighted', 'per_class']

# A confusion matrix of more numbers than this is unreadable, and would fill a device.
_MOST_CELLS = 2**26


def F1(
    *,
    average: Average | None = None,
    scores: str = 'logits',
    labels: str = 'labels',
    weights: str = 'weights',
    threshold: float = 0.0,
    classes: int | None = None,
) -> type[Sums]:
    """Returns the class of a metric: the harmonic mean of precision and recall.

    Args:
        average: 'binary' for the class 1 of two; 'micro' over all decisions; 'macro' for the mean
            over classes; 'weighted' by their number of examples; 'per_class' for an array. None is
            'binary' for one decision per example, else 'macro'. A class that neither a label nor a
            prediction names is left out of means.
        scores: the task's output of scores (batch, ..., classes), the highest of which is the
            prediction; or in the shape of the labels, for decisions. Integers are the predicted
            classes themselves.
        labels: the task's output of labels: integers (batch, ...), or 0 and 1 (batch, ..., labels)
            for decisions. A negative label is not counted.
        weights: the task's output of weights, (batch,) or (batch, ...).
        threshold: a score above it is a positive decision. Use 0.5 for probabilities.
        classes: number of classes, for integer predictions.
    """
    return _configure_counts('F1', _F1, average, scores, labels, weights, threshold, classes)


def Precision(
    *,
    average: Average | None = None,
    scores: str = 'logits',
    labels: str = 'labels',
    weights: str = 'weights',
    threshold: float = 0.0,
    classes: int | None = None,
) -> type[Sums]:
    """Returns the class of a metric: the share of predictions that are correct.

    The arguments are those of F1.
    """
    return _configure_counts(
        'Precision', _Precision, average, scores, labels, weights, threshold, classes
    )


def Recall(
    *,
    average: Average | None = None,
    scores: str = 'logits',
    labels: str = 'labels',
    weights: str = 'weights',
    threshold: float = 0.0,
    classes: int | None = None,
) -> type[Sums]:
    """Returns the class of a metric: the share of labels that are predicted.

    The arguments are those of F1.
    """
    return _configure_counts(
        'Recall', _Recall, average, scores, labels, weights, threshold, classes
    )


def ConfusionMatrix(
    *,
    scores: str = 'logits',
    labels: str = 'labels',
    weights: str = 'weights',
    threshold: float = 0.0,
    classes: int | None = None,
) -> type[Sums]:
    """Returns the class of a metric: how often each class is predicted for each label.

    It computes an array (label, prediction), or with several labels per example one such matrix of
    negative and positive for each: (labels, 2, 2). The arguments are those of F1.
    """
    names = {'scores': scores, 'labels': labels, 'weights': weights}
    return configure(
        _ConfusionMatrix, 'ConfusionMatrix', threshold=threshold, classes=classes, **names
    )


def CalibrationError(
    *,
    bins: int = 15,
    from_logits: bool = True,
    scores: str = 'logits',
    labels: str = 'labels',
    weights: str = 'weights',
) -> type[Sums]:
    """Returns the class of a metric: the expected calibration error (ECE).

    The mean over predictions of |mean probability - share of hits| in the bin of their probability
    (Guo et al. 2017, https://arxiv.org/abs/1706.04599): that of the predicted class, or for
    decisions that of a positive one.

    Args:
        bins: number of bins of equal width.
        from_logits: whether the scores are logits, and not probabilities.
        scores: the task's output of scores, as in F1.
        labels: the task's output of labels, as in F1.
        weights: the task's output of weights, as in F1.

    Raises:
        ValueError: if there is no bin.
    """
    if bins < 1:
        raise ValueError(f'bins: expected at least 1, got {bins}')
    names = {'scores': scores, 'labels': labels, 'weights': weights}
    return configure(
        _CalibrationError, 'CalibrationError', bins=bins, from_logits=from_logits, **names
    )


def _configure_counts(
    name: str,
    base: type[_Counts],
    average: Average | None,
    scores: str,
    labels: str,
    weights: str,
    threshold: float,
    classes: int | None,
) -> type[Sums]:
    if average is not None:
        check_average(average, get_args(Average))
    names = {'scores': scores, 'labels': labels, 'weights': weights}
    settings = {'average': average, 'threshold': threshold, 'classes': classes}
    return configure(base, name, **names, **settings)


class _Decided(Sums):
    """Sums over decisions."""

    scores: ClassVar[str]
    labels: ClassVar[str]
    weights: ClassVar[str]
    threshold: ClassVar[float]
    classes: ClassVar[int | None]

    @classmethod
    def decide(cls, outputs: dict[str, Any]) -> Decisions:
        """Returns the decisions of a batch."""
        return decide(cls, outputs, threshold=cls.threshold, classes=cls.classes)


class _Counts(_Decided):
    """For each class the weight of its hits, its labels and its predictions.

    The sums are (classes, 3), or (labels, 2, 3): each label has a negative and a positive class.
    """

    average: ClassVar[Average | None]

    @classmethod
    def sum_batch(cls, outputs: dict[str, Any]) -> jax.Array:
        """Returns hits, labels and predictions."""
        found = cls.decide(outputs)
        if cls.average == 'binary' and (found.labels.ndim > 1 or found.classes != 2):
            several = f'{found.classes} classes' if found.labels.ndim == 1 else 'several labels'
            raise UserError(
                f"the metric {cls.__name__}: average='binary' is for one decision per example, and "
                f"there are {several}. Use 'micro', 'macro' or 'weighted'"
            )
        label, guess = (_compare(x, found.classes) for x in (found.labels, found.guesses))
        weights = found.weights[..., None]
        parts = (label & guess, label, guess)
        return jnp.stack([jnp.where(x, weights, 0.0).sum(0) for x in parts], -1)

    def compute(self) -> Any:
        """Returns the average, a float; or an array (classes,)."""
        counts = self.sums
        if not counts.ndim or not counts[..., 1].sum():
            return float('nan')
        several = counts.ndim == 3
        of_classes = counts[:, 1] if several else counts
        average = self.average
        if average is None:
            average = 'binary' if not several and len(counts) == 2 else 'macro'
        if average == 'binary':
            return float(self.score(of_classes[1]))
        if average == 'micro':
            return float(self.score(of_classes.sum(0)))
        if average == 'per_class':
            return self.score(of_classes)
        if not several:
            of_classes = of_classes[of_classes[:, 1:].any(1)]
        support = of_classes[:, 1] if average == 'weighted' else np.ones(len(of_classes))
        # 0 if no label is positive: the support is 0.
        return float(_divide((self.score(of_classes) * support).sum(), support.sum()))

    @staticmethod
    def score(counts: np.ndarray) -> np.ndarray:
        """Returns the metric for counts (..., 3), 0 where it is undefined."""
        raise NotImplementedError


class _F1(_Counts):
    @staticmethod
    def score(counts: np.ndarray) -> np.ndarray:
        """Returns 2 hits / (labels + predictions)."""
        return _divide(2 * counts[..., 0], counts[..., 1] + counts[..., 2])


class _Precision(_Counts):
    @staticmethod
    def score(counts: np.ndarray) -> np.ndarray:
        """Returns hits / predictions."""
        return _divide(counts[..., 0], counts[..., 2])


class _Recall(_Counts):
    @staticmethod
    def score(counts: np.ndarray) -> np.ndarray:
        """Returns hits / labels."""
        return _divide(counts[..., 0], counts[..., 1])


class _ConfusionMatrix(_Decided):
    @classmethod
    def sum_batch(cls, outputs: dict[str, Any]) -> jax.Array:
        """Returns the matrix of a batch."""
        found = cls.decide(outputs)
        if found.classes**2 > _MOST_CELLS:
            raise UserError(
                f'the metric {cls.__name__} of {found.classes} classes has {found.classes**2:.2g} '
                'numbers. Use F1, Precision or Recall, which count each class once'
            )
        label, guess = (_compare(x, found.classes) for x in (found.labels, found.guesses))
        # A product, because additions at indices have no fixed order on a GPU.
        return jnp.einsum(
            'n...t,n...p->...tp',
            jnp.where(label, found.weights[..., None], 0.0),
            guess.astype(jnp.float32),
            precision='highest',
        )

    def compute(self) -> np.ndarray:
        """Returns the matrix, float64."""
        return self.sums


class _CalibrationError(Sums):
    """For each bin the weight of its predictions, of their probabilities and of their hits."""

    scores: ClassVar[str]
    labels: ClassVar[str]
    weights: ClassVar[str]
    bins: ClassVar[int]
    from_logits: ClassVar[bool]

    @classmethod
    def sum_batch(cls, outputs: dict[str, Any]) -> jax.Array:
        """Returns the sums of each bin, (bins, 3)."""
        found = read_scored(cls, outputs)
        scores = found.scores.astype(jnp.float32)
        if found.kind == 'multiclass':
            every = jax.nn.softmax(scores) if cls.from_logits else scores
            probability, hit = every.max(-1), scores.argmax(-1) == found.labels
        else:
            probability = jax.nn.sigmoid(scores) if cls.from_logits else scores
            hit = found.labels > 0.5
        weights = broadcast_weights(found.weights, found.labels.shape)
        weights = jnp.where(found.labels >= 0, weights, 0.0).ravel()
        values = jnp.stack([jnp.ones_like(weights), probability.ravel(), hit.ravel()], -1)
        # Selected, because a value of weight 0 may be NaN, and 0 x NaN is NaN.
        values = jnp.where(weights[:, None] != 0, values * weights[:, None], 0.0)
        number = (probability.ravel()[:, None] > _inner_edges(cls.bins)).sum(-1)
        return jnp.einsum(
            'nb,nv->bv', jax.nn.one_hot(number, cls.bins), values, precision='highest'
        )

    def compute(self) -> float:
        """Returns the error, in [0, 1]."""
        sums = self.sums
        if not sums.ndim or not sums[:, 0].sum():
            return float('nan')
        return float(np.abs(sums[:, 1] - sums[:, 2]).sum() / sums[:, 0].sum())


def _compare(numbers: jax.Array, classes: int) -> jax.Array:
    """Returns whether each number is each class, bool (..., classes)."""
    return numbers[..., None] == jnp.arange(classes)


def _divide(part: Any, whole: Any) -> Any:
    """Returns a quotient, 0 where it is undefined, as scikit-learn does with a warning."""
    return np.divide(part, whole, out=np.zeros_like(whole), where=np.asarray(whole) != 0)


def _inner_edges(bins: int) -> np.ndarray:
    """Returns the edges between bins, float32.

    They are rounded down, so that a float32 is above an edge exactly if it is in float64.
    """
    exact = np.linspace(0, 1, bins + 1)[1:-1]
    rounded = exact.astype(np.float32)
    below = np.nextafter(rounded, np.float32(0))
    return np.where(rounded > exact, below, rounded)
