# SPDX-License-Identifier: Apache-2.0
"""Metrics of `trainer.metrics` are those of scikit-learn and scipy, on random data."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import clu.metrics
import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats

from trainer import metrics
from trainer.config.errors import UserError

theirs = pytest.importorskip('sklearn.metrics')
calibration_curve = pytest.importorskip('sklearn.calibration').calibration_curve

AVERAGES = ('micro', 'macro', 'weighted', 'per_class')
EXAMPLES = 1000


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Scikit-learn warns of what it defines as 0."""
    with warnings.catch_warnings(action='ignore'):
        yield


def data(kind: str, *, ties: bool = False, absent: bool = False) -> dict[str, np.ndarray]:
    """Returns scores, labels and weights of EXAMPLES examples.

    Args:
        kind: 'binary', 'multiclass', 'multilabel'.
        ties: whether scores are equal now and then.
        absent: whether a class or label never occurs, nor is predicted.
    """
    rng = np.random.default_rng([len(kind), ties, absent])
    shape = (EXAMPLES,) if kind == 'binary' else (EXAMPLES, 6)
    logits = rng.normal(size=shape).astype(np.float32)
    if ties:
        logits = logits.round(0)
    if kind == 'multiclass':
        labels = rng.integers(0, 6, EXAMPLES)
        logits[np.arange(EXAMPLES), labels] += 1
        if absent:
            labels[labels == 4] = 0
            logits[:, 4] = -9
    else:
        labels = (rng.random(shape) < scipy.special.expit(2 * logits)).astype(np.int32)
        if absent:
            labels[..., 4], logits[..., 4] = 0, -9
    return {
        'logits': logits,
        'labels': labels,
        'weights': rng.uniform(0.1, 3, EXAMPLES).astype(np.float32),
    }


def compute(metric: Any, found: dict[str, np.ndarray], **others: np.ndarray) -> Any:
    """Returns a metric of all examples: batches of 300, and rows of padding that count nothing."""
    metric, found = clu.metrics.Collection.create(x=metric), {**found, **others}
    found.setdefault('weights', np.ones(EXAMPLES, np.float32))
    total = metric.empty()
    for start in range(0, EXAMPLES, 300):
        batch = {name: x[start : start + 300] for name, x in found.items()}
        junk = {name: np.full((5, *x.shape[1:]), 3 if name == 'labels' else np.nan, x.dtype)
                for name, x in batch.items()}  # fmt: skip
        junk['weights'] = np.zeros(5, np.float32)
        batch = {name: np.concatenate([x, junk[name]]) for name, x in batch.items()}
        one = metric.single_from_model_output(**jax.tree.map(jax.numpy.asarray, batch))
        total = total.merge(one)
    return total.compute()['x']


def none_for_classes(average: str) -> str | None:
    return None if average == 'per_class' else average


@pytest.mark.parametrize('average', AVERAGES)
@pytest.mark.parametrize('kind', ['binary', 'multiclass', 'multilabel'])
@pytest.mark.parametrize('absent', [False, True])
@pytest.mark.parametrize('weighted', [False, True])
def test_f1_precision_and_recall(kind: str, average: Any, absent: bool, weighted: bool) -> None:
    found = data(kind, absent=absent and kind != 'binary', ties=kind == 'multiclass')
    if not weighted:
        found.pop('weights')
    logits, labels = found['logits'], found['labels']
    predicted = logits.argmax(-1) if kind == 'multiclass' else logits > 0
    for name in ('F1', 'Precision', 'Recall'):
        options: dict[str, Any] = {'average': none_for_classes(average)}
        if average == 'per_class' and kind == 'multiclass':
            options['labels'] = range(6)  # Otherwise the array has no place for an absent one.
        function = getattr(theirs, f'{name.lower()}_score')
        want = function(labels, predicted, sample_weight=found.get('weights'), **options)
        got = compute(getattr(metrics, name)(average=average), found)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_f1_of_one_decision_is_that_of_a_yes() -> None:
    found = data('binary')
    want = theirs.f1_score(found['labels'], found['logits'] > 0, sample_weight=found['weights'])
    assert compute(metrics.F1(), found) == pytest.approx(want, abs=1e-6)
    both = {**found, 'logits': np.stack([0 * found['logits'], found['logits']], -1)}
    assert compute(metrics.F1(average='binary'), both) == pytest.approx(want, abs=1e-6)
    # Predictions as such, and probabilities.
    guesses = compute(metrics.F1(scores='guess', classes=2), found, guess=found['logits'] > 0)
    assert guesses == pytest.approx(want, abs=1e-6)
    share = scipy.special.expit(found['logits'])
    assert compute(metrics.F1(scores='p', threshold=0.5), found, p=share) == guesses


@pytest.mark.parametrize('weighted', [False, True])
def test_confusion_matrix(weighted: bool) -> None:
    for kind in ('binary', 'multiclass', 'multilabel'):
        found = data(kind, absent=kind == 'multiclass')
        if not weighted:
            found.pop('weights')
        logits, labels = found['logits'], found['labels']
        if kind == 'multilabel':
            want = theirs.multilabel_confusion_matrix(
                labels, logits > 0, sample_weight=found.get('weights')
            )
        else:
            many = kind == 'multiclass'
            want = theirs.confusion_matrix(
                labels, logits.argmax(-1) if many else logits > 0, labels=range(6 if many else 2),
                sample_weight=found.get('weights'),
            )  # fmt: skip
        got = compute(metrics.ConfusionMatrix(), found)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        if not weighted:
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('average', AVERAGES)
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('weighted', [False, True])
def test_auc_and_average_precision(average: Any, ties: bool, weighted: bool) -> None:
    for kind in ('binary', 'multilabel', 'multiclass'):
        found = data(kind, ties=ties)
        if not weighted:
            found.pop('weights')
        scores: Any = found['logits'].astype(np.float64)
        labels, options = found['labels'], {'sample_weight': found.get('weights')}
        options['average'] = none_for_classes(average)
        if kind == 'multiclass':
            scores = scipy.special.softmax(scores, -1)
        want = theirs.roc_auc_score(labels, scores, multi_class='ovr', **options)
        got = compute(metrics.AUC(average=average), found)
        np.testing.assert_allclose(np.squeeze(got), want, rtol=0, atol=1e-6)
        want = theirs.average_precision_score(labels, scores, **options)
        got = compute(metrics.AveragePrecision(average=average), found)
        np.testing.assert_allclose(np.squeeze(got), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize('average', ['macro', 'weighted'])
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('weighted', [False, True])
def test_auc_of_pairs_of_classes(average: Any, ties: bool, weighted: bool) -> None:
    found = data('multiclass', ties=ties)
    scores = scipy.special.softmax(found['logits'].astype(np.float64), -1)
    times = np.ones(len(scores), int)
    if weighted:  # scikit-learn takes no weights here: an example of weight 2 is there twice.
        times = np.arange(len(scores)) % 3
    found['weights'] = times.astype(np.float32)
    labels, scores = np.repeat(found['labels'], times), np.repeat(scores, times, 0)
    want = theirs.roc_auc_score(labels, scores, multi_class='ovo', average=average)
    got = compute(metrics.AUC(average=average, multi_class='ovo'), found)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_pairs_with_a_class_that_never_occurs() -> None:
    found = data('multiclass', absent=True)
    found.pop('weights')
    scores = scipy.special.softmax(found['logits'].astype(np.float64), -1)
    assert np.isnan(compute(metrics.AUC(multi_class='ovo'), found))
    present = np.unique(found['labels'])
    pairs = []
    for one, two in itertools.combinations(present, 2):
        kept = np.isin(found['labels'], [one, two])
        yes, part = found['labels'][kept], scores[kept]
        pairs += [theirs.roc_auc_score(yes == i, part[:, i]) for i in (one, two)]
    got = compute(metrics.AUC(multi_class='ovo', skip_absent=True), found)
    assert got == pytest.approx(np.mean(pairs), abs=1e-6)


def test_pairs_need_classes() -> None:
    with pytest.raises(ValueError, match="expected average='macro' or 'weighted', got 'micro'"):
        metrics.AUC(multi_class='ovo', average='micro')
    with pytest.raises(ValueError, match="multi_class: expected 'ovr' or 'ovo', got 'ova'"):
        metrics.AUC(multi_class='ova')  # type: ignore[arg-type]
    with pytest.raises(UserError, match="with multi_class='ovo' compares classes, but 'logits'"):
        compute(metrics.AUC(multi_class='ovo'), data('multilabel'))


def test_labels_that_never_occur() -> None:
    found = data('multilabel', absent=True)
    labels, logits, weights = found['labels'], found['logits'], found['weights']
    options = {'sample_weight': weights}
    for average in ('micro', 'macro', 'weighted'):
        want = theirs.roc_auc_score(labels, logits, average=average, **options)
        np.testing.assert_allclose(compute(metrics.AUC(average=average), found), want, atol=1e-6)
        want = theirs.average_precision_score(labels, logits, average=average, **options)
        got = compute(metrics.AveragePrecision(average=average), found)
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.isnan(compute(metrics.AUC(), found))
    kept = [0, 1, 2, 3, 5]
    want = theirs.roc_auc_score(labels[:, kept], logits[:, kept], **options)
    got = compute(metrics.AUC(skip_absent=True), found)
    assert got == pytest.approx(want, abs=1e-6)


def test_two_logits_are_a_decision() -> None:
    found = data('binary', ties=True)
    both = {**found, 'logits': np.stack([-found['logits'], found['logits']], -1)}
    for metric in (metrics.AUC(), metrics.AveragePrecision()):
        assert compute(metric, both) == compute(metric, found)


@pytest.mark.parametrize('bins', [1, 10, 15])
def test_calibration_error_of_decisions(bins: int) -> None:
    """scikit-learn has the curve: its bins and their numbers make the error."""
    found = data('binary', ties=True)  # With probabilities of 0.5, on a border.
    found.pop('weights')
    share = np.asarray(jax.nn.sigmoid(found['logits']))
    right, mean = calibration_curve(found['labels'], share, n_bins=bins)
    edges = np.linspace(0, 1, bins + 1)
    sizes = np.bincount(np.searchsorted(edges[1:-1], share), minlength=bins)
    want = (np.abs(right - mean) * sizes[sizes > 0]).sum() / EXAMPLES
    assert compute(metrics.CalibrationError(bins=bins), found) == pytest.approx(want, abs=1e-6)
    of_share = metrics.CalibrationError(bins=bins, scores='p', from_logits=False)
    assert compute(of_share, found, p=share) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize('ties', [False, True])
def test_correlations(ties: bool) -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=EXAMPLES).astype(np.float32)
    two = (one + rng.normal(size=EXAMPLES)).astype(np.float32)
    if ties:
        one, two = one.round(1), two.round(0)
    found = {'predictions': one, 'targets': two}
    for metric, function in (
        (metrics.Spearman(), scipy.stats.spearmanr),
        (metrics.Pearson(), scipy.stats.pearsonr),
    ):
        want = function(one.astype(np.float64), two).statistic
        assert compute(metric, found) == pytest.approx(want, abs=1e-6)
        # A weight is how often an example counts.
        times = rng.integers(0, 4, EXAMPLES)
        want = function(*(np.repeat(x, times).astype(np.float64) for x in (one, two))).statistic
        got = compute(metric, found, weights=times.astype(np.float32))
        assert got == pytest.approx(want, abs=1e-6)
