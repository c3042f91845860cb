# SPDX-License-Identifier: Apache-2.0
"""AUC, average precision and correlations, by their definitions over all pairs.

`test_metrics_as_scikit_learn.py` compares them with scikit-learn, where that is installed.
"""

from __future__ import annotations

from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from trainer import metrics
from trainer.config.errors import UserError

SIZE = 60


def share_of_pairs(yes: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    """Returns how often a yes scores higher than a no, half of the time if equal."""
    pairs = weights[yes][:, None] * weights[~yes]
    above = scores[yes][:, None] - scores[~yes]
    return float((pairs * ((above > 0) + 0.5 * (above == 0))).sum() / pairs.sum())


def mean_precision(yes: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    """Returns the mean over the yes of the precision of all that score as high."""
    as_high = (scores >= scores[yes][:, None]) * weights
    precision = (as_high * yes).sum(1) / as_high.sum(1)
    return float(np.average(precision, weights=weights[yes]))


@pytest.fixture(scope='module')
def ranking() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns answers, scores with ties, and weights, some of which are 0."""
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(SIZE, 3)).round(1)
    yes = rng.random((SIZE, 3)) < 0.3 + 0.3 * (scores > 0)
    return yes, scores, rng.integers(0, 3, SIZE).astype(np.float64)


@pytest.mark.parametrize(
    ('function', 'definition'),
    [(metrics.auc, share_of_pairs), (metrics.average_precision, mean_precision)],
)
def test_by_definition(function: Any, definition: Any, ranking: Any) -> None:
    yes, scores, weights = ranking
    each = [definition(yes[:, i], scores[:, i], weights) for i in range(3)]
    got = function(yes[:, 0], scores[:, 0], weights)
    assert type(got) is float and got == pytest.approx(each[0])
    assert function(yes[:, :1], scores[:, :1], weights) == got
    np.testing.assert_allclose(function(yes, scores, weights, average='per_class'), each)
    assert function(yes, scores, weights) == pytest.approx(np.mean(each))
    support = (yes * weights[:, None]).sum(0)
    got = function(yes, scores, weights, average='weighted')
    assert got == pytest.approx(np.average(each, weights=support))
    pooled = definition(yes.ravel(), scores.ravel(), np.repeat(weights, 3))
    assert function(yes, scores, weights, average='micro') == pytest.approx(pooled)
    # Classes, each against the rest.
    labels = scores.argmax(1)
    hot = labels[:, None] == np.arange(3)
    assert function(labels, -scores, weights) == function(hot, -scores, weights)


def test_what_is_not_known() -> None:
    """A label below 0 or NaN does not count; without a yes or a no there is no AUC."""
    labels = np.array([[1, 0, -1], [0, np.nan, -1], [1, 1, 0]])
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.9, 0.5], [0.1, 0.8, 0.5]])
    np.testing.assert_array_equal(
        metrics.auc(labels, scores, average='per_class'), [0.5, 1, np.nan]
    )
    assert np.isnan(metrics.auc(labels, scores))
    assert metrics.auc(labels, scores, skip_absent=True) == 0.75
    assert metrics.average_precision(labels, scores, average='per_class')[2] == 0
    assert np.isnan(metrics.auc(labels[:, 2:], scores[:, 2:], skip_absent=True))
    # A model that has diverged has no score, but padding may hold anything.
    wrong = np.where(labels == 0, np.nan, scores)
    assert np.isnan(metrics.auc(labels[:, 0], wrong[:, 0]))
    assert np.isnan(metrics.average_precision(labels[:, 0], wrong[:, 0]))
    assert metrics.auc([1, 0, 1], [np.nan, 0.5, 0.6], [0, 1, 1]) == 1
    assert np.isnan(metrics.spearman([1, 2, 3], [1, np.nan, 3]))


def test_correlations_of_ranks_and_values() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, SIZE)).round(0)
    two += one
    want = scipy.stats.spearmanr(one, two).statistic
    assert metrics.spearman(one, two) == pytest.approx(want, abs=1e-12)
    assert metrics.pearson(one, two) == pytest.approx(np.corrcoef(one, two)[0, 1], abs=1e-12)
    times = rng.integers(0, 3, SIZE)
    want = scipy.stats.spearmanr(np.repeat(one, times), np.repeat(two, times)).statistic
    assert metrics.spearman(one, two, times) == pytest.approx(want, abs=1e-12)
    for function in (metrics.spearman, metrics.pearson):
        assert np.isnan(function(np.full(5, 0.1), np.arange(5.0)))
        assert np.isnan(function([], []))


def collect(metric: Any, batches: Any) -> Any:
    """Returns a metric of batches, whose arrays a compiled function returns."""

    @jax.jit
    def run(batch: dict[str, Any]) -> dict[str, Any]:
        return {name: x[0] for name, x in metric.from_model_output(**batch).values.items()}

    total = metric.empty()
    for batch in batches:
        total = total.merge(metric({name: (np.asarray(x),) for name, x in run(batch).items()}))
    return total.compute()


def test_the_metric_is_the_function_of_all_examples(ranking: Any) -> None:
    yes, scores, weights = ranking
    arrays = {'logits': scores, 'labels': yes, 'weights': weights}
    batches = [
        {name: jnp.asarray(x[i : i + 20]) for name, x in arrays.items()} for i in (0, 20, 40)
    ]
    metric = metrics.AUC()
    assert issubclass(metric, clu.metrics.CollectingMetric)
    assert collect(metric, batches) == pytest.approx(metrics.auc(yes, scores, weights))
    # Classes, by their probabilities; a label for each token, and a weight for each example.
    labels = yes.argmax(1)
    batches = [
        {
            'scores': jnp.asarray(scores[i : i + 20].reshape(10, 2, 3)),
            'labels': jnp.asarray(labels[i : i + 20].reshape(10, 2)),
            'weights': jnp.asarray(weights[i // 2 : i // 2 + 10]),
        }
        for i in (0, 20, 40)
    ]
    powers = np.exp(np.float32(scores).astype(np.float64))
    shares = powers / powers.sum(1, keepdims=True)
    want = metrics.average_precision(labels, shares, np.repeat(weights[:30], 2))
    metric = metrics.AveragePrecision(scores='scores')
    assert collect(metric, batches) == pytest.approx(want)
    assert np.isnan(metric.empty().compute())
    one, two = scores[:, :1], scores[:, 1:2]
    batches = [{'predictions': jnp.asarray(one), 'targets': jnp.asarray(two)}]
    assert collect(metrics.Spearman(), batches) == pytest.approx(
        scipy.stats.spearmanr(one, two).statistic
    )


@pytest.mark.parametrize(
    ('metric', 'outputs', 'message'),
    [
        (metrics.AUC(), {'labels': jnp.ones(6)}, "AUC reads 'logits', which the task does not"),
        (metrics.AUC(), {'logits': jnp.ones((6, 3)), 'labels': jnp.ones((6, 2))},
         r"'logits' is float32\[6, 3\] and 'labels' is float32\[6, 2\]; expected scores"),
        (metrics.Spearman(), {'predictions': jnp.ones((6, 2)), 'targets': jnp.ones((6, 2))},
         r"Spearman: 'predictions' is float32\[6, 2\] .* expected one number for each example"),
        (metrics.Pearson(), {'predictions': jnp.ones(6)}, "Pearson reads 'targets'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(metric: Any, outputs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda given: metric.from_model_output(**given), outputs)


@pytest.mark.parametrize(
    ('function', 'arrays', 'message'),
    [
        (metrics.auc, (np.ones((4, 2)), np.ones((4, 3))), r'labels of \[4, 2\] and scores of'),
        (metrics.auc, (np.ones(4), np.ones(4), np.ones(3)), r'weights of \[3\] do not fit'),
        (metrics.spearman, (np.ones(4), np.ones((4, 1))), r'expected equal shapes \[examples\]'),
    ],
)
def test_arrays_that_do_not_fit(function: Any, arrays: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arrays)


def test_an_average_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"average: expected one of 'micro', .* got 'samples'"):
        metrics.AUC(average='samples')  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"average: expected one of 'micro', .* got 'samples'"):
        metrics.auc([1, 0], [1, 0], average='samples')  # type: ignore[arg-type]
