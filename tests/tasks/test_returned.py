# SPDX-License-Identifier: Apache-2.0
"""Messages about invalid results of a task."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.small import trainer_in
from trainer.config.errors import UserError
from trainer.tasks import Classification, NextToken, Regression, TaskOutput
from trainer.tasks.runner import MASK, TaskRunner

BATCH = {
    'x': jax.ShapeDtypeStruct((32, 10), jnp.float32),
    'label': jax.ShapeDtypeStruct((32,), jnp.int32),
}
NO_MEAN = 'one loss for each example, (batch, ...), not their mean: leave out .mean()'


def flax_example(model: Any, batch: Any) -> Any:
    """Returns the mean loss and the logits, like the loss functions of Flax's examples."""
    logits = model(batch['x'])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return loss.mean(), logits


def message_for(task: Callable[..., Any], **more: Any) -> str:
    """Returns the error message for the result of a task."""
    runner = TaskRunner.from_task(task)
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda batch: runner(lambda x: x, batch), {**BATCH, **more})
    return str(error.value)


def test_mean_loss_with_logits_is_explained() -> None:
    text = message_for(flax_example)
    assert text.startswith(
        'the task tests.tasks.test_returned:flax_example returned (float32[], float32[32, 10]). '
        'The first item must be the loss of each example, (batch, ...), not their mean, and the '
        'second a dict of metrics with one value for each example: '
    )
    assert text.endswith("return loss, {'accuracy': logits.argmax(-1) == labels}")


@pytest.mark.parametrize(
    ('task', 'message'),
    [
        (
            lambda m, b: (m(b['x']).sum(-1), m(b['x'])),
            '(float32[32], float32[32, 10]). The first item must be the loss of each example, '
            '(batch, ...), and the second a dict of metrics',
        ),
        (
            lambda m, b: (m(b['x']).mean(), (m(b['x']), {'mean': m(b['x'])})),
            "(float32[], (float32[32, 10], {'mean': float32[32, 10]})). The first item",
        ),
        (
            lambda m, b: m(b['x']).mean(),
            f'returned a scalar, float32[], as the loss: a task returns {NO_MEAN}',
        ),
        (lambda m, b: (m(b['x']).mean(), {}), NO_MEAN),
        (lambda m, b: TaskOutput(loss=m(b['x']).mean()), NO_MEAN),
        (lambda m, b: {'a': m(b['x']).mean()}, "a scalar, float32[], as the loss 'a'"),
        (lambda m, b: {'a': m(b['x']).mean()}, 'one loss and its metrics are (loss, dict)'),
        (lambda m, b: (m(b['x']), {'a': 'x'}), "str as the metric 'a': expected an array"),
        (lambda m, b: (m(b['x']), {'a': object()}), "object as the metric 'a': expected"),
        (lambda m, b: {'a': m(b['x']), 'aux': {}}, "{} as the loss 'aux': expected an array"),
        (lambda m, b: None, 'returned None. Is a return statement missing?'),
        (lambda m, b: (1, 2, 3), 'returned (int, int, int). A task returns the loss of each'),
        (lambda m, b: [m(b['x']), {}], 'returned [float32[32, 10], {}]. The first item'),
        (lambda m, b: 0.5, f'returned float. A task returns {NO_MEAN}'),
        (
            lambda m, b: np.zeros(32),
            'returned float64[32]. Values computed with numpy have no gradient',
        ),
        (
            lambda m, b: TaskOutput(loss=m(b['x']).sum(-1), weights=jnp.ones(10)),
            'float32[10] as the weights of a loss float32[32]: expected [32], one for each',
        ),
        (
            lambda m, b: TaskOutput(loss=m(b['x']).sum(-1), metrics=m(b['x'])),
            'float32[32, 10] as metrics: expected a dict',
        ),
        (
            lambda m, b: TaskOutput(loss=m(b['x']).sum(-1), penalties={'l2': m(b['x'])}),
            "float32[32, 10] as the penalty 'l2': expected a scalar",
        ),
    ],
)
def test_invalid_results_are_explained(task: Any, message: str) -> None:
    text = message_for(task)
    assert text.startswith('the task tests.tasks.test_returned:<lambda> returned ')
    assert message in text


@pytest.mark.parametrize('name', ['f1-score', 'class', 'top 5', '', 1])
def test_metric_names_must_be_identifiers(name: Any) -> None:
    text = message_for(lambda m, b: (m(b['x']), {name: m(b['x'])}))
    assert f'names a metric {name!r}: expected a Python identifier, such as' in text


def test_loss_of_broadcast_pairs_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger('trainer').propagate = True

    def pairs(model: Any, batch: Any) -> Any:
        return (model(batch['x'])[:, :1] - batch['label']) ** 2

    def rows(model: Any, batch: Any) -> Any:
        return (model(batch['x'])[:, 0] - batch['label']) ** 2

    def sequence(model: Any, batch: Any) -> Any:
        return batch['x'] ** 2

    for _ in range(2):
        jax.eval_shape(lambda batch: TaskRunner.from_task(pairs)(lambda x: x, batch), BATCH)
        jax.eval_shape(lambda batch: TaskRunner.from_task(rows)(lambda x: x, batch), BATCH)
        long = {**BATCH, 'x': jax.ShapeDtypeStruct((32, 32), jnp.float32)}
        jax.eval_shape(lambda batch: TaskRunner.from_task(sequence)(lambda x: x, batch), long)
    [message] = caplog.messages
    assert 'pairs returned the loss float32[32, 32] for a batch of 32 examples' in message
    assert 'arrays of shapes [32, 1] and [32] broadcast to pairs' in message


@pytest.mark.parametrize('shape', [(32, 33), (32, 8, 8, 3)])
def test_loss_with_as_many_values_as_examples_is_not_warned_about(
    shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Next tokens of 32 texts, or 32 patches of 32 images."""
    logging.getLogger('trainer').propagate = True

    def parts(model: Any, batch: Any) -> Any:
        return batch['x'].reshape(32, -1)[:, :32]

    batch = {'x': jax.ShapeDtypeStruct(shape, jnp.float32)}
    jax.eval_shape(lambda batch: TaskRunner.from_task(parts)(lambda x: x, batch), batch)
    assert not caplog.records


@pytest.mark.parametrize('weights', [2.0, 2, np.float32(2)])
def test_one_weight_for_all_examples(weights: Any) -> None:
    def task(model: Any, batch: Any) -> TaskOutput:
        return TaskOutput(loss=batch['x'].sum(-1), weights=weights)

    output = TaskRunner.from_task(task)(lambda x: x, {'x': jnp.ones((32, 3))})
    assert output.weights.tolist() == [2.0] * 32


def test_loss_without_the_batch_dimension_is_rejected() -> None:
    mask = {MASK: jax.ShapeDtypeStruct((32,), jnp.bool_)}
    assert '[10] for a batch of 32 examples' in message_for(lambda m, b: m(b['x']).sum(0), **mask)


@pytest.mark.parametrize(
    ('task', 'message'),
    [
        (lambda m, b: m(b['image']).argmax(-1), 'int32[32] as the loss, which has no gradient'),
        (lambda m, b: m(b['image']).sum(-1) + 1j, 'complex64[32] as the loss: expected real'),
        (
            lambda m, b: {'loss': m(b['image']).sum(-1), 'logits': m(b['image'])},
            'the losses loss, logits, but config.optimizer.groups does not assign',
        ),
    ],
)
def test_losses_that_are_not_differentiable_are_rejected(task: Any, message: str) -> None:
    experiment = dataclasses.replace(trainer_in(None).experiment, task=TaskRunner.from_task(task))
    with pytest.raises(UserError, match=re.escape(message)):
        type(trainer_in(None))(experiment).compile()


@pytest.mark.parametrize(
    'task',
    [Classification(inputs='x'), Regression(inputs='x', targets='x'), NextToken(tokens='label')],
)
def test_model_that_returns_more_than_an_array_is_rejected(task: Any) -> None:
    with pytest.raises(UserError) as error:
        task(
            lambda x: (jnp.ones((32, 10)), {}),
            {'x': jnp.ones((32, 10)), 'label': jnp.ones((32, 2))},
        )
    assert (
        'config.task: the model returned (float32[32, 10], {}), and '
        f'trainer.tasks:{type(task).__name__} expects one array'
    ) in str(error.value)
