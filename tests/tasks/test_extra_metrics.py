# SPDX-License-Identifier: Apache-2.0
"""Metrics that a config adds to a task: what they are given, in runs and over a whole split."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small
from tests.command import ROOT
from trainer import metrics
from trainer.config.errors import UserError
from trainer.data.mnist import MNIST
from trainer.experiment import load_and_build
from trainer.tasks import Answer, Classification, NextToken, Regression
from trainer.tasks.runner import TaskRunner
from trainer.trainer import Trainer

LOGITS = np.array([[2.0, -1.0, 0.5], [-3.0, 0.25, 0.125], [0.0, 1.0, 2.0]], np.float32)
EXTRA = {'f1': metrics.F1()}
OPTIONS: dict[str, Any] = {
    'train_for': '4 steps',
    'data__source__limit': 320,
    'evals__test__data__source__limit': 100,
    'evals__test__data__batch_size': 64,
    'log__every': '4 steps',
}


def node(name: str, **arguments: Any) -> dict[str, Any]:
    return {'target': f'trainer.metrics:{name}', **arguments}


def outputs(task: Any, **batch: Any) -> Any:
    given = {name: jnp.asarray(x) for name, x in batch.items()}
    return TaskRunner.from_task(task)(lambda x, **_: x, given)


@pytest.mark.parametrize(
    ('arguments', 'label', 'want'),
    [
        ({}, [2, 1, 0], [2, 1, 0]),
        ({'ignore_label': 255}, np.array([2, 255, 0], np.uint8), [2, -1, 0]),
        ({}, np.eye(3, dtype=np.float32)[[2, 1, 0]], [2, 1, 0]),
        ({'loss': 'sigmoid'}, [2, 1, 0], np.eye(3)[[2, 1, 0]]),
        ({'loss': 'sigmoid', 'ignore_label': 9}, [2, 9, 0], [[0, 0, 1], [-1] * 3, [1, 0, 0]]),
        ({'loss': 'sigmoid', 'ignore_label': -2}, [[0, 1, -2], [1, 1, 0], [-2, 0, 0]],
         [[0, 1, -1], [1, 1, 0], [-1, 0, 0]]),
    ],
)  # fmt: skip
def test_metrics_of_classification_get_logits_and_labels(
    arguments: Any, label: Any, want: Any
) -> None:
    """Labels that do not count are negative, as the metrics expect."""
    task = Classification(**arguments, extra_metrics=EXTRA)
    batch = {'image': jnp.asarray(LOGITS), 'label': jnp.asarray(label)}
    found = task(lambda x: x, batch)
    np.testing.assert_array_equal(found.metrics['labels'], want)
    np.testing.assert_array_equal(found.metrics['logits'], LOGITS)
    alone = dataclasses.replace(task, extra_metrics={})(lambda x: x, batch)
    assert set(alone.metrics) == {'accuracy'}
    # The trainer computes rows that do not count with other values.
    runner = TaskRunner.from_task(task)
    measured = runner.measure(runner(lambda x: x, batch)).compute()
    assert set(measured) == {'loss', 'accuracy', 'f1'}
    given = {'logits': batch['image'], 'labels': jnp.asarray(want)}
    assert measured['f1'] == EXTRA['f1'].from_model_output(**given).compute()


def test_metrics_of_regression_get_predictions_and_targets() -> None:
    task = Regression(extra_metrics={'rank': metrics.Spearman()})
    found = outputs(task, inputs=LOGITS[:, :1], targets=[[1.0], [0.0], [2.0]])
    rank = task.extra_metrics['rank'].from_model_output(weights=found.weights, **found.metrics)
    assert rank.compute() == pytest.approx(0.5)


def test_perplexity_of_tokens() -> None:
    tokens = jnp.array([[0, 1, 2], [1, 1, 0]])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3)), jnp.float32)
    task = NextToken(extra_metrics={'perplexity': metrics.Perplexity(), 'f1': metrics.F1()})
    runner = TaskRunner.from_task(task)
    found = runner(lambda x: logits, {'tokens': tokens})
    values = runner.measure(found).compute()
    assert values['perplexity'] == pytest.approx(np.exp(values['loss']), rel=1e-6)
    right = np.asarray(logits.argmax(-1))[:, :2] == np.asarray(tokens)[:, 1:]
    assert values['accuracy'] == pytest.approx(right.mean())


def test_metrics_of_answers_leave_out_what_follows_their_end() -> None:
    targets = jnp.array([[1, 2, 0, 3], [3, 0, 1, 1]])
    said = jnp.array([[1, 1, 0, 0], [3, 0, 2, 2]])
    task = Answer(
        extra_metrics={
            'f1': metrics.F1(scores='answer', classes=4, average='micro'),
            'table': metrics.ConfusionMatrix(),
        }
    )
    runner = TaskRunner.from_task(task)
    batch = {'inputs': targets, 'lengths': jnp.array([4, 4]), 'targets': targets}
    values = runner.measure(runner(lambda *_: jax.nn.one_hot(said, 4), batch)).compute()
    # Four of five tokens are right, two of three in the first answer; and one of two answers.
    assert values['f1'] == pytest.approx(0.8)
    assert values['accuracy'] == pytest.approx((2 / 3 + 1) / 2)
    assert values['exact_match'] == 0.5
    expected = np.diag([2, 1, 0, 1])
    expected[2, 1] = 1
    np.testing.assert_array_equal(values['table'], expected)


@pytest.mark.slow
def test_metrics_of_a_whole_split_by_config() -> None:
    """On 8 devices, with padding in the last batch; the other metrics are as without them."""
    extra = {
        'f1': node('F1', average='macro'),
        'matrix': node('ConfusionMatrix'),
        'ece': node('CalibrationError', bins=10),
        'perplexity': node('Perplexity'),
        'hits': {'ref': 'clu.metrics:Accuracy'},
        'auc': node('AUC', average='weighted'),
    }
    config = str(ROOT / 'configs' / 'mnist_mlp.py')
    trainer = Trainer(load_and_build(config, task__extra_metrics=extra, **OPTIONS))
    state = trainer.init_state()
    found = trainer.evaluate(state)['test']
    plain = Trainer(load_and_build(config, **OPTIONS)).evaluate(state)['test']
    assert {name: found[name] for name in plain} == plain

    matrix = found.arrays['matrix']
    assert matrix.shape == (10, 10) and matrix.sum() == 100
    assert np.trace(matrix) / 100 == pytest.approx(found['accuracy'])
    assert found['hits'] == pytest.approx(found['accuracy'])
    each = 2 * np.diag(matrix) / np.maximum(matrix.sum(0) + matrix.sum(1), 1)
    occurs = matrix.sum(0) + matrix.sum(1) > 0
    assert found['f1'] == pytest.approx(each[occurs].mean())
    assert found['perplexity'] == pytest.approx(np.exp(found['loss']))

    batch = MNIST('test').gather(np.arange(100))
    images = jnp.asarray(batch['image'], jnp.float32) / 255
    shares = jax.nn.softmax(trainer.model(state)(images))
    want = metrics.auc(batch['label'], shares, average='weighted')
    assert found['auc'] == pytest.approx(want, abs=1e-6)
    assert 0 < found['ece'] < 1


@pytest.mark.slow
@pytest.mark.parametrize('options', [{}, {'ensemble__size': 2}])
def test_a_run_resumes_with_other_metrics(
    options: Any, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its parameters are those of a run that always had them, and it can be measured later."""
    given = {**options, 'checkpoint__every': '4 steps', 'log__every': '3 steps'}
    first = small.trainer_in(tmp_path, train_for='4 steps', **given)
    state = first.fit().state
    extra = {'f1': node('F1'), 'matrix': node('ConfusionMatrix')}
    measured = small.trainer_in(tmp_path, task__extra_metrics=extra, **given)
    found = measured.evaluate(measured.restore('latest'))['test']
    assert found['loss'] == first.evaluate(state)['test']['loss']
    assert found.arrays['matrix'].sum() == 100
    caplog.clear()
    more = {**given, 'train_for': '8 steps', 'task__extra_metrics': extra}
    resumed = small.trainer_in(tmp_path, allow=True, **more).fit()
    assert 'are not those of the checkpoint of step 4: a resumed run resets them' in caplog.text
    whole = small.trainer_in(None, **more).fit()
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    assert resumed.metrics['train/f1'] == whole.metrics['train/f1']  # Of the steps from 6 to 8.


@pytest.mark.slow
def test_rows_of_training_have_them_too() -> None:
    extra = {'f1': node('F1', average='micro')}
    for options in ({}, {'ensemble__size': 2, 'accumulate': 2, 'steps_per_call': 3}):
        given = {**OPTIONS, **options, 'task__extra_metrics': extra}
        trainer = Trainer(load_and_build(str(ROOT / 'configs' / 'mnist_mlp.py'), **given))
        found = trainer.fit().metrics
        for prefix in ('train', 'eval/test'):
            # Of one label and one prediction for each example.
            assert found[f'{prefix}/f1'] == pytest.approx(found[f'{prefix}/accuracy'])


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        ({'accuracy': node('F1')}, "the task has a metric 'accuracy'; choose another name"),
        ({'f-1': node('F1')}, "extra_metrics: expected Python identifiers as names, got 'f-1'"),
        ({'f1': 'f1'}, r"extra_metrics\.f1: expected a metric, such as dict\(target=.* got str"),
        ({'f1': {'ref': 'trainer.metrics:F1'}},
         "got the function trainer.metrics:F1: name it by 'target', not by 'ref'$"),
        ({'f1': node('F1', average='marco')}, r'task\.extra_metrics\.f1: .* average: expected one'),
        ({'f1': node('F1', avrage='macro')}, r'Did you mean config\.task\.extra_metrics\.f1\.av'),
        ({'learning_rate': node('F1')}, "'learning_rate', but this name is reserved"),
    ],
)  # fmt: skip
def test_what_is_no_metric_is_refused_when_the_config_is_built(extra: Any, message: str) -> None:
    config = str(ROOT / 'configs' / 'mnist_mlp.py')
    with pytest.raises(UserError, match=message) as caught:
        load_and_build(config, task__extra_metrics=extra, **OPTIONS)
    assert "without a 'target'" not in str(caught.value)


@pytest.mark.parametrize('name', ['F1', 'AUC'])  # On the devices, and on the host.
def test_a_metric_of_another_task_is_refused_before_the_first_step(name: str) -> None:
    config = str(ROOT / 'configs' / 'mnist_mlp.py')
    extra = {'mine': node(name, scores='x')}
    task = {'target': 'trainer.tasks:Classification', 'extra_metrics': extra}
    message = f"extra_metrics.mine: the metric {name} reads 'x', which the task does not return"
    for path, options in (
        ('config.evals.test.task', {'evals__test__task': task}),
        ('config.task', {'task__extra_metrics': extra}),
    ):
        trainer = Trainer(load_and_build(config, **options, **OPTIONS))
        with pytest.raises(UserError, match=re.escape(f'{path}.{message}')) as caught:
            trainer.compile()
        assert str(caught.value).count('config.evals.test') <= 1


class OfTask:
    """A task with metrics of its own, which read what it does not return."""

    metrics = clu.metrics.Collection.create(
        loss=metrics.WeightedMean.from_output('loss'), right=metrics.F1(scores='score')
    )

    def __call__(self, model: Any, batch: Any) -> Any:
        return model(batch['x'])[:, 0], {'labels': batch['y']}


def test_a_metric_of_the_task_itself_is_named() -> None:
    runner = TaskRunner.from_task(OfTask())
    batch = {'x': jnp.asarray(LOGITS), 'y': jnp.zeros(3, jnp.int32)}
    output = runner(lambda x: x, batch)
    where = re.escape(f"the metric 'right' of the task {__name__}:OfTask: the metric F1 reads")
    with pytest.raises(UserError, match=where):
        runner.measure(output)
