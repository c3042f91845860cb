# SPDX-License-Identifier: Apache-2.0
"""The tasks of this package, and the interface of tasks."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.command import ROOT
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.tasks import Classification, TaskOutput
from trainer.tasks.metrics import WeightedMean, non_finite_names
from trainer.tasks.runner import TaskRunner, loss_sums, safe_inverse
from trainer.tasks.task import as_output
from trainer.trainer import Trainer

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


@pytest.mark.parametrize(
    ('extra', 'name'),
    [
        ({'metrics': {'loss': jnp.zeros(4)}}, "metric 'loss'"),
        ({'metrics': {'weights': jnp.zeros(4)}}, "metric 'weights'"),
        ({'metrics': {'examples': jnp.zeros(4)}}, "metric 'examples'"),
        ({'penalties': {'loss': jnp.zeros(())}}, "penalty 'loss'"),
        ({'penalties': {'grad_norm': jnp.zeros(())}}, "penalty 'grad_norm'"),
        ({'metrics': {'l2': jnp.zeros(4)}, 'penalties': {'l2': jnp.zeros(())}}, "penalty 'l2'"),
        ({'loss': {'a': jnp.ones(4)}, 'metrics': {'a_loss': jnp.zeros(4)}}, "metric 'a_loss'"),
    ],
)
def test_reserved_metric_names_are_rejected(extra: dict[str, Any], name: str) -> None:
    """A metric called 'weights' would replace the weights of all means."""
    with pytest.raises(UserError, match=f'names a {name}, but this name is reserved'):
        as_output(TaskOutput(**{'loss': jnp.ones(4), **extra}))
    as_output(TaskOutput(loss=jnp.ones(4), metrics={'l1': jnp.ones(4)}, penalties={'l2': 1.0}))


class Own:
    """A task with its own metric collection, whose inputs may have any name."""

    def __init__(self, name: str):
        self.metrics = clu.metrics.Collection.create(
            **{name: clu.metrics.Average.from_output('examples')}
        )

    def __call__(self, model: Any, batch: Any) -> TaskOutput:
        loss = model(batch['image']).sum(-1)
        return TaskOutput(loss=loss, metrics={'examples': loss})


def test_reported_names_of_a_collection_are_checked() -> None:
    with pytest.raises(UserError, match="names a metric 'examples', but this name is reserved"):
        TaskRunner.from_task(Own('examples'))
    experiment = dataclasses.replace(mlp().experiment, task=TaskRunner.from_task(Own('mean')))
    Trainer(experiment).init_state()


def test_mean_of_no_examples_is_not_a_failure() -> None:
    nothing, bad = WeightedMean.empty(), WeightedMean.from_model_output(jnp.array([jnp.nan, 1.0]))
    masked = WeightedMean.from_model_output(jnp.array([jnp.nan]), jnp.zeros(1))
    assert non_finite_names({'task': {'a_loss': nothing, 'b_loss': masked}}) == []
    assert non_finite_names({'task': {'a_loss': nothing, 'b_loss': bad}}) == ['b_loss']


def test_logged_loss_is_minimized_with_negative_weights() -> None:
    output = TaskOutput(loss=jnp.array([3.0, 5.0]), weights=jnp.array([1.0, -3.0]))
    totals, weights, _ = loss_sums(output)
    logged = WeightedMean.from_model_output(output.loss, output.weights)
    assert logged.compute() == totals['loss'] * safe_inverse(weights['loss']) == 6.0


@pytest.mark.parametrize(
    ('task', 'message'),
    [
        (lambda model, batch: model(batch['image']).sum(), 'returned a scalar'),
        (lambda model, batch: None, 'returned None'),
        (lambda model, batch: (1, 2, 3), r'returned \(int, int, int\)'),
        (
            lambda model, batch: (model(batch['image']).sum(-1), {'acc': jnp.ones(())}),
            r"the metric 'acc' of the task: expected an array with one value for each example",
        ),
        (
            lambda model, batch: (model(batch['image']).sum(-1), {'acc': {'a': jnp.ones(4)}}),
            "the metric 'acc' of the task",
        ),
    ],
)
def test_invalid_results_stop_compilation(task: Any, message: str) -> None:
    run = mlp()
    experiment = dataclasses.replace(run.experiment, task=TaskRunner.from_task(task))
    with pytest.raises(UserError, match=message):
        Trainer(experiment).compile()


def test_task_with_another_signature_is_rejected() -> None:
    with pytest.raises(UserError, match=r'must take \(model, batch\): too many positional'):
        TaskRunner.from_task(lambda batch: batch)


class InBatch(Classification):
    """A task whose examples depend on each other."""

    decomposable = False


def mlp(**options: Any) -> Trainer:
    small = {'train_for': '2 steps', 'data__source__limit': 64, 'evals': {}}
    config = str(ROOT / 'configs' / 'mnist_mlp.py')
    return Trainer(load_and_build(config, **{**small, **options}))


def test_task_with_in_batch_negatives_rejects_accumulate() -> None:
    target = {'target': f'{__name__}:InBatch'}
    assert mlp(task=target).fit().step == 2
    with pytest.raises(
        UserError,
        match=r'InBatch cannot be computed in 4 micro-batches: its examples depend',
    ):
        mlp(task=target, accumulate=4)


@pytest.mark.slow
def test_batch_statistics_of_micro_batches_are_warned_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger('trainer').propagate = True
    mlp(accumulate=4).fit()
    mlp(model__batch_norm=True).fit()
    assert caplog.messages == []
    mlp(accumulate=4, model__batch_norm=True).fit()
    assert [m for m in caplog.messages if 'batch statistics' in m] == caplog.messages
    assert len(caplog.messages) == 1


def pixels(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns images and their brightness, as inputs and targets."""
    return {'x': batch['image'], 'y': batch['image'].mean((1, 2))}


@pytest.mark.slow
def test_regression_learns_from_a_config() -> None:
    fields = ({'ref': f'{__name__}:pixels'},)
    result = mlp(
        train_for='300 steps',
        model__features=(16, 1),
        task={'target': 'trainer.tasks:Regression', 'inputs': 'x', 'targets': 'y'},
        data__device_transforms=({'target': 'trainer.data.transforms:ToFloat'}, *fields),
        log__every='100 steps',
    ).fit()
    assert result.metrics['train/loss'] < 0.002
    assert result.metrics['train/mean_absolute_error'] < 0.04
