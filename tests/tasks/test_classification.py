# SPDX-License-Identifier: Apache-2.0
"""Losses, metrics and predictions of `Classification`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.tasks import Classification

LOGITS = np.array([[2.0, -1.0, 0.5], [-3.0, 0.25, 0.125]], np.float32)


def output(task: Any, label: Any) -> Any:
    return task(lambda x: jnp.asarray(x), {'image': LOGITS, 'label': jnp.asarray(label)})


def test_softmax_labels_of_both_kinds_agree() -> None:
    """Integer and one-hot labels give the same loss and accuracy."""
    integer = output(Classification(), [2, 1])
    one_hot = output(Classification(), np.eye(3, dtype=np.float32)[[2, 1]])
    np.testing.assert_allclose(integer.loss, one_hot.loss, rtol=1e-6)
    expected = -np.take_along_axis(jax.nn.log_softmax(LOGITS), np.array([[2], [1]]), 1)[:, 0]
    np.testing.assert_allclose(integer.loss, expected, rtol=1e-6)
    assert integer.metrics['accuracy'].tolist() == [False, True]


def test_sigmoid_loss_and_accuracy() -> None:
    """Binary cross-entropy summed over the classes, accuracy averaged over them."""
    labels = np.array([[1, 0, 0], [0, 1, 1]], np.float32)
    result = output(Classification(loss='sigmoid'), labels)
    probability = 1 / (1 + np.exp(-LOGITS))
    expected = -np.log(np.where(labels == 1, probability, 1 - probability)).sum(1)
    np.testing.assert_allclose(result.loss, expected, rtol=1e-6)
    np.testing.assert_allclose(result.metrics['accuracy'], [2 / 3, 1], rtol=1e-6)
    of_integers = output(Classification(loss='sigmoid'), [0, 1])
    of_one_hot = output(Classification(loss='sigmoid'), np.eye(3, dtype=np.float32)[[0, 1]])
    np.testing.assert_array_equal(of_integers.loss, of_one_hot.loss)
    smooth = output(Classification(loss='sigmoid', label_smoothing=0.2), labels)
    target = labels * 0.8 + 0.1
    expected = -(target * np.log(probability) + (1 - target) * np.log(1 - probability)).sum(1)
    np.testing.assert_allclose(smooth.loss, expected, rtol=1e-6)


def test_one_logit_is_a_binary_decision() -> None:
    """A label (batch,) means the same as one (batch, 1)."""
    task = Classification(loss='sigmoid', ignore_label=-1)
    for label in ([1, 0], [1, -1]):
        one, other = (
            task(lambda x: x, {'image': jnp.asarray(LOGITS[:, :1]), 'label': jnp.array(labels)})
            for labels in (label, [[each] for each in label])
        )
        np.testing.assert_array_equal(one.loss, other.loss)
        np.testing.assert_array_equal(one.weights, other.weights)
        assert one.metrics['accuracy'].tolist() == other.metrics['accuracy'].tolist()
        np.testing.assert_allclose(one.loss[0], np.log1p(np.exp(-2.0)), rtol=1e-6)


@pytest.mark.parametrize('loss', ['softmax', 'sigmoid'])
def test_fields_are_kept_in_predictions(loss: Any) -> None:
    task = Classification(loss=loss, keep=('label', 'length'))
    batch = {'image': jnp.asarray(LOGITS), 'label': jnp.array([2, 1]), 'length': jnp.array([3, 4])}
    predicted = task.predict(lambda x: x, batch)
    others = Classification(loss=loss).predict(lambda x: x, batch)
    assert predicted.keys() == {*others, 'label', 'length'}
    assert predicted['length'] is batch['length']


@pytest.mark.parametrize('keep', ['label', ('probability',)])
def test_fields_that_cannot_be_kept(keep: Any) -> None:
    with pytest.raises(ValueError, match=r'keep: expected a tuple of batch keys, none of which'):
        Classification(keep=keep)


def test_sigmoid_predicts_each_class() -> None:
    model, batch = (lambda x: jnp.asarray(x)), {'image': LOGITS}
    predicted = Classification(loss='sigmoid').predict(model, batch)
    assert predicted['classes'].tolist() == (LOGITS > 0).tolist()
    np.testing.assert_allclose(predicted['probabilities'], 1 / (1 + np.exp(-LOGITS)), rtol=1e-6)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'loss': 'hinge'}, "expected 'softmax' or 'sigmoid', got 'hinge'"),
        ({'loss': 'sigmoid', 'top_k': (5,)}, 'which does not rank classes'),
        ({'top_k': [5]}, r'expected a tuple of integers such as \(5,\)'),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classification(**options)
