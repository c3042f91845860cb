# SPDX-License-Identifier: Apache-2.0
"""F1, precision, recall, confusion matrix, calibration error and perplexity, by their definitions.

`test_metrics_as_scikit_learn.py` compares them with scikit-learn, where that is installed.
"""

from __future__ import annotations

from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer import metrics
from trainer.config.errors import UserError
from trainer.tasks.measured import check_accumulates, check_computes
from trainer.tasks.sums import Sums, empty_like

# Six examples of three classes; class 2 is never predicted, and class 3 does not occur.
LABELS = jnp.array([0, 0, 0, 1, 1, 2])
GUESSES = jnp.array([0, 0, 1, 1, 0, 1])
LOGITS = jax.nn.one_hot(GUESSES, 4)


def compute(metric: Any, **outputs: Any) -> Any:
    return metric.from_model_output(**outputs).compute()


def test_f1_of_each_class_and_their_means() -> None:
    given = {'logits': LOGITS, 'labels': LABELS}
    each = compute(metrics.F1(average='per_class'), **given)
    np.testing.assert_allclose(each, [2 / 3, 2 / 5, 0, 0])
    assert compute(metrics.F1(), **given) == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
    assert compute(metrics.F1(average='micro'), **given) == pytest.approx(3 / 6)
    weighted = compute(metrics.F1(average='weighted'), **given)
    assert weighted == pytest.approx((3 * 2 / 3 + 2 * 2 / 5) / 6)
    precision = compute(metrics.Precision(average='per_class'), **given)
    np.testing.assert_allclose(precision, [2 / 3, 1 / 3, 0, 0])
    recall = compute(metrics.Recall(average='per_class'), **given)
    np.testing.assert_allclose(recall, [2 / 3, 1 / 2, 0, 0])


def test_what_does_not_count() -> None:
    """Negative labels, and rows of weight 0, whatever they hold."""
    given = {
        'logits': jnp.concatenate([LOGITS, LOGITS[:1], jnp.full((1, 4), jnp.nan)]),
        'labels': jnp.concatenate([LABELS, jnp.array([-1, 7])]),
        'weights': jnp.array([1.0] * 7 + [0.0]),
    }
    matrix = compute(metrics.ConfusionMatrix(), **given)
    np.testing.assert_array_equal(matrix[:3, :3], [[2, 1, 0], [1, 1, 0], [0, 1, 0]])
    assert matrix.shape == (4, 4) and matrix.sum() == 6
    want = compute(metrics.F1(), logits=LOGITS, labels=LABELS)
    assert compute(metrics.F1(), **given) == want
    want = compute(metrics.CalibrationError(), logits=LOGITS, labels=LABELS)
    assert compute(metrics.CalibrationError(), **given) == pytest.approx(want)
    # Of predictions that are integers.
    labels = jnp.array([0, -1, 2])
    matrix = compute(metrics.ConfusionMatrix(classes=3), logits=labels + 0, labels=labels)
    np.testing.assert_array_equal(matrix, np.diag([1, 0, 1]))
    f1 = compute(metrics.F1(classes=3), logits=jnp.array([0, 1, 2]), labels=labels)
    assert f1 == 1
    # Of some labels of an example.
    given = {'logits': jnp.array([[1.0, 1.0]]), 'labels': jnp.array([[1.0, jnp.nan]])}
    assert compute(metrics.F1(average='per_class'), **given).tolist() == [1, 0]


def test_tokens_have_labels_and_weights_of_their_own() -> None:
    given = {'logits': LOGITS.reshape(2, 3, 4), 'labels': LABELS.reshape(2, 3)}
    want = compute(metrics.F1(), logits=LOGITS, labels=LABELS)
    assert compute(metrics.F1(), **given) == want
    # One weight for each example.
    second = compute(metrics.ConfusionMatrix(), **given, weights=jnp.array([0.0, 2.0]))
    np.testing.assert_array_equal(second[:3, :3], [[0, 0, 0], [2, 2, 0], [0, 2, 0]])


def test_calibration_error_of_classes() -> None:
    """In each bin, the probability of the predicted class is compared with the share of hits."""
    probabilities = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]])
    given = {'logits': jnp.log(probabilities), 'labels': jnp.array([0, 1, 1, 1])}
    # Bins of a quarter: {0.9, 0.8}: one hit of two; {0.7, 0.55}: two hits of two.
    want = (2 * abs(0.85 - 0.5) + 2 * abs(0.625 - 1)) / 4
    assert compute(metrics.CalibrationError(bins=4), **given) == pytest.approx(want, abs=1e-6)
    named = metrics.CalibrationError(bins=4, scores='probabilities', from_logits=False)
    got = compute(named, probabilities=probabilities, labels=given['labels'])
    assert got == pytest.approx(want, abs=1e-6)


def test_probabilities_at_the_border_of_bins_fall_as_in_float64() -> None:
    """The float32 of 0.3 is above 0.3, that of 0.7 below; each is alone in its bin, or is not."""
    share = np.repeat(np.arange(1, 10, dtype=np.float32) / 10, 2)
    share[1::2] -= 0.05
    hit = np.arange(18) % 3 == 0
    number = np.searchsorted(np.linspace(0, 1, 11)[1:-1], share.astype(np.float64))
    want = sum(abs((share - hit)[number == i].sum()) for i in range(10)) / 18
    metric = metrics.CalibrationError(bins=10, from_logits=False)
    got = compute(metric, logits=jnp.asarray(share), labels=jnp.asarray(hit))
    assert got == pytest.approx(want, abs=1e-6)


def test_perplexity_is_exp_of_the_mean_of_all_batches() -> None:
    metric = metrics.Perplexity()
    loss = jnp.array([[1.0, 2.0], [3.0, jnp.nan]])
    weights = jnp.array([[1.0, 1.0], [2.0, 0.0]])
    parts = [
        metric.from_model_output(loss=x, weights=w) for x, w in zip(loss, weights, strict=True)
    ]
    assert parts[0].merge(parts[1]).compute() == pytest.approx(np.exp(9 / 4))
    assert metric.from_model_output(loss=jnp.array([800.0])).compute() == np.inf
    assert np.isnan(metric.empty().compute())


def test_losses_per_word_and_per_byte() -> None:
    """Padding counts in neither sum, nor does an example of weight 0."""
    loss = jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, jnp.nan]])
    weights = jnp.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    whole = {'loss': loss, 'weights': weights, 'words': jnp.array([3, 1, 100])}
    parts = [{name: x[rows] for name, x in whole.items()} for rows in (slice(0, 2), slice(2, 3))]
    for metric, expected in (
        (metrics.Perplexity(count='words'), np.exp(7 / 4)),
        (metrics.BitsPerUnit(count='words'), 7 / 4 / np.log(2)),
    ):
        assert compute(metric, **whole) == pytest.approx(expected)
        first, second = (metric.from_model_output(**part) for part in parts)
        assert first.merge(second).compute() == pytest.approx(expected)
        assert np.isnan(metric.empty().compute()) and np.isnan(second.compute())
        # A number for each loss: those of weight 0 do not count.
        each = {**whole, 'words': jnp.array([[2, 1], [50, 1], [50, 50]])}
        assert compute(metric, **each) == pytest.approx(expected)
    with pytest.raises(UserError, match=r'BitsPerUnit reads .*letters.*NextToken returns those'):
        compute(metrics.BitsPerUnit(count='letters'), **whole)


def test_counts_are_exact_beyond_what_a_float32_holds() -> None:
    metric = metrics.ConfusionMatrix(scores='guess')
    one = {'guess': jnp.ones(1, bool), 'labels': jnp.ones(1, bool)}
    start = metric.from_model_output(**one, weights=jnp.array([2.0**24]))
    add = jax.jit(lambda total: total.merge(metric.from_model_output(**one)))
    total = add(add(add(start)))
    assert total.compute()[1, 1] == 2**24 + 3
    assert float(total.total[1, 1]) != 2**24 + 3
    # The rounding errors, too, add up to more than a float32 holds.
    large, odd = (metric.empty().replace(total=jnp.float32(x)) for x in (2**40, 2**15 + 1))
    add_often = jax.jit(lambda x: jax.lax.fori_loop(0, 1000, lambda _, x: x.merge(odd), x))
    assert add_often(large).sums == 2**40 + 1000 * (2**15 + 1)
    tenths = metric.empty()
    add = jax.jit(lambda x: x.merge(metric.from_model_output(**one, weights=jnp.array([0.1]))))
    tenths = empty_like(tenths, jax.eval_shape(add, tenths))
    for _ in range(1000):
        tenths = add(tenths)
    assert tenths.compute()[1, 1] == pytest.approx(1000 * float(np.float32(0.1)), rel=1e-12)


METRICS = [
    metrics.F1(),
    metrics.F1(average='per_class'),
    metrics.ConfusionMatrix(),
    metrics.CalibrationError(),
    metrics.Perplexity(),
]


@pytest.mark.parametrize('metric', METRICS, ids=lambda metric: metric.__name__)
def test_accumulators_have_a_fixed_shape_once_a_batch_is_known(metric: Any) -> None:
    collection = clu.metrics.Collection.create(x=metric)
    batch = {'logits': LOGITS, 'labels': LABELS, 'loss': jnp.ones(6), 'weights': jnp.ones(6)}
    new = jax.eval_shape(lambda outputs: collection.single_from_model_output(**outputs), batch)
    empty = empty_like({'task': collection.empty()}, {'task': new})
    check_accumulates(empty, {'task': new})
    check_computes(jax.eval_shape(lambda: empty))
    for nothing in (empty['task'], collection.empty()):
        value = np.asarray(nothing.compute()['x'])
        assert np.isnan(value).all() or not value.any()
        merged = nothing.merge(collection.single_from_model_output(**batch))
        np.testing.assert_array_equal(merged.compute()['x'], compute(metric, **batch))


def test_equal_arguments_make_one_class() -> None:
    """A metric's class is part of the type of a state, which is compared."""
    assert metrics.F1(average='micro') is metrics.F1(average='micro')
    assert metrics.F1(average='micro') is not metrics.F1(average='macro')
    assert issubclass(metrics.F1(), Sums)


@pytest.mark.parametrize(
    ('metric', 'outputs', 'message'),
    [
        (metrics.F1(), {'labels': LABELS},
         r"F1 reads 'logits', which the task does not return; it returns labels\. Name another"),
        (metrics.F1(), {'logits': LOGITS, 'labels': LABELS[:5]},
         r"'logits' is float32\[6, 4\] and 'labels' is int32\[5\]; expected scores \[batch, class"),
        (metrics.F1(), {'logits': LOGITS, 'labels': LABELS * 1.0}, 'with integer labels'),
        (metrics.F1(), {'logits': GUESSES, 'labels': LABELS}, 'and their number: classes=10'),
        (metrics.F1(classes=3), {'logits': LOGITS, 'labels': LABELS}, 'classes=3, but .* for 4'),
        (metrics.F1(average='binary'), {'logits': LOGITS, 'labels': LABELS},
         "average='binary' is for one decision per example, and there are 4 classes"),
        (metrics.F1(average='binary'), {'logits': LOGITS, 'labels': LOGITS}, 'several labels'),
        (metrics.F1(), {'logits': LOGITS, 'labels': LABELS, 'weights': jnp.ones((6, 2))},
         r"'weights' is float32\[6, 2\], which does not fit labels of int32\[6\]"),
        (metrics.CalibrationError(), {'logits': LOGITS}, "CalibrationError reads 'labels'"),
        (metrics.ConfusionMatrix(), {'logits': jnp.ones((1, 50_257)), 'labels': jnp.zeros(1, int)},
         '50257 classes has 2.5e.09 numbers. Use F1'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(metric: Any, outputs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda given: metric.from_model_output(**given), outputs)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"average: expected one of 'binary', .* got 'marco'"):
        metrics.F1(average='marco')  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='bins: expected at least 1, got 0'):
        metrics.CalibrationError(bins=0)
