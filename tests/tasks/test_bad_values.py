# SPDX-License-Identifier: Apache-2.0
"""Labels that do not fit the model: errors name the example."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.command import ROOT
from tests.marks import slow_after
from trainer.config.errors import UserError
from trainer.data.sources import ArraySource
from trainer.experiment import load_and_build
from trainer.tasks import Classification, NextToken
from trainer.tasks.runner import run_checks
from trainer.trainer import Trainer

WARN = {'guard': {'non_finite': 'warn'}}
MLP = str(ROOT / 'configs' / 'mnist_mlp.py')


class Images(ArraySource):
    """64 images of 4 classes, one of which has an invalid label."""

    def __init__(self, bad: Any = 0, at: int = 37, dtype: str = 'int32', column: bool = False):
        label = (np.arange(64) % 4).astype(dtype)
        label[at] = bad
        image = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
        super().__init__({'image': image, 'label': label[:, None] if column else label})


def trainer(train: dict[str, Any], test: dict[str, Any] | None = None, **overrides: Any) -> Trainer:
    source = {'target': f'{__name__}:Images'}
    evals = {
        'test': {
            'every': '2 steps',
            'data': {'source': {**source, **(test or {})}, 'batch_size': 16},
        }
    }
    data = {'source': {**source, **train}, 'batch_size': 8}
    options = {
        'data': data, 'evals': evals, 'train_for': '16 steps', 'log__every': '4 steps',
        'model': {'target': 'trainer.models.mlp:MLP', 'features': (8, 4)},
    }  # fmt: skip
    return Trainer(load_and_build(MLP, **{**options, **overrides}))


@pytest.mark.parametrize(
    ('bad', 'options'),
    slow_after(3, [
        (-1, {}),
        (-1, {'steps_per_call': 2}),
        # `guard` is only for non-finite values.
        (4, WARN),
        (4, {}), (-100, {}), (-1, {'accumulate': 2, 'data__batch_size': 16}),
        (-1, {'ensemble': {'size': 2}}),
        (-1, WARN), (-1, {**WARN, 'steps_per_call': 2, 'log__every': 'never'}),
    ]),
)  # fmt: skip
def test_label_out_of_range_names_the_example(bad: int, options: dict[str, Any]) -> None:
    made = trainer({'bad': bad}, **options)
    with pytest.raises(UserError) as caught:
        made.fit()
    said = str(caught.value)
    assert f"config.task: batch['label'] contains {bad} (example 37 in step " in said
    assert 'expected 0 to 3. The model returns 4 logits.' in said


def same(example: dict[str, Any]) -> dict[str, Any]:
    return example


def loader_config(loader: str) -> dict[str, Any]:
    stages = ({'target': 'trainer.data.stages:Map', 'fn': {'ref': f'{__name__}:same'}},)
    return {'target': f'trainer.data.streaming:{loader}', 'stages': stages}


@pytest.mark.slow
def test_label_out_of_range_in_a_stream_names_the_row() -> None:
    """Examples of a stream have no numbers."""
    made = trainer(
        {'bad': -1, 'at': 37}, data__loader=loader_config('StreamLoader'), checkpoint__every='never'
    )
    with pytest.raises(UserError, match=r'contains -1 \(example \d of batch 0 in step \d'):
        made.fit()
    made = trainer(
        {}, {'bad': 9, 'at': 37}, evals__test__data__loader=loader_config('StreamEvalLoader')
    )
    with pytest.raises(UserError, match=r'contains 9 \(example 5 of batch 2 of its split\)'):
        made.fit()


def test_label_out_of_range_in_an_evaluation() -> None:
    with pytest.raises(
        UserError, match=r"config\.evals\.test: batch\['label'\] contains -1 \(example 5"
    ):
        trainer({}, {'bad': -1, 'at': 5}).fit()


@pytest.mark.slow
def test_ignored_labels_do_not_count() -> None:
    """Neither in the loss nor in the accuracy, with or without smoothing."""
    task = {'target': 'trainer.tasks:Classification', 'ignore_label': -1}
    result = trainer({'bad': -1}, {'bad': -1}, task=task).fit()
    assert result.status == 'finished'
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    labels = jnp.array([0, -1, 2, 3, -1])
    for smoothing in (0.0, 0.1):
        made = Classification(ignore_label=-1, label_smoothing=smoothing, top_k=(2,))
        output = made(lambda x: x, {'image': logits, 'label': labels})
        kept = np.array([0, 2, 3])
        target = optax.smooth_labels(jax.nn.one_hot(labels[kept], 4), smoothing)
        wanted = optax.softmax_cross_entropy(logits[kept], target).mean()
        weights = np.asarray(output.weights)
        assert weights.tolist() == [1, 0, 1, 1, 0]
        assert float((output.loss * weights).sum() / weights.sum()) == pytest.approx(float(wanted))
        assert run_checks(output.checks, output.weights)[0] == 0


def test_ignored_labels_per_class() -> None:
    made = Classification(loss='sigmoid', ignore_label=-1)
    logits = jnp.array([[2.0, -1.0], [0.5, 3.0], [1.0, 1.0]])
    labels = jnp.array([[1, -1], [0, 1], [-1, -1]])
    output = made(lambda x: x, {'image': logits, 'label': labels})
    each = optax.sigmoid_binary_cross_entropy(logits, labels)
    np.testing.assert_allclose(output.loss, [each[0, 0], each[1, 0] + each[1, 1], 0], rtol=1e-6)
    np.testing.assert_allclose(output.metrics['accuracy'], [1, 0.5, 0])
    assert output.weights.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ('train', 'task', 'message'),
    [
        ({'column': True}, {}, r'is int32\[8, 1\], and the model .*\[8, 4\].*one dimension too'),
        ({'column': True, 'dtype': 'float32'}, {}, r'is float32\[8, 1\], and the model'),
        ({'dtype': 'float32'}, {}, 'is float32.*Class indices must be integers'),
        ({'column': True}, {'loss': 'sigmoid'}, r'is int32\[8, 1\]'),
        ({}, {'top_k': (2, 9)}, 'config.task.top_k: 9 exceeds the 4 classes'),
    ],
)
def test_invalid_shapes_and_dtypes_are_rejected(
    train: dict[str, Any], task: dict[str, Any], message: str
) -> None:
    task = {'target': 'trainer.tasks:Classification', **task}
    with pytest.raises(UserError) as caught:
        trainer(train, train, task=task).fit()
    assert re.search(message, str(caught.value), re.S), caught.value


def step_by_hand(state: Any, batch: Any, ctx: Any) -> Any:
    """A custom step without `ctx.gradients`, whose loss has another name."""
    loss, grads = jax.value_and_grad(lambda p: ctx.loss(ctx.task(ctx.bind(p), batch)))(state.params)
    params = jax.tree.map(lambda p, g: p - 0.01 * g, state.params, grads)
    return state.replace(params=params), {'objective': loss}


@pytest.mark.slow
@pytest.mark.parametrize('options', [{}, WARN])
def test_labels_are_checked_in_custom_steps(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r'contains 9 \(example 37 in step'):
        trainer({'bad': 9}, step={'ref': f'{__name__}:step_by_hand'}, evals={}, **options).fit()


@pytest.mark.parametrize(('loss', 'bad'), [('sigmoid', 7.0), ('sigmoid', -1), ('softmax', -1.0)])
def test_labels_per_class_are_between_0_and_1(loss: str, bad: float) -> None:
    labels = jnp.zeros((3, 4)).at[:, 1].set(1).at[2, 2].set(bad)
    output = Classification(loss=loss)(lambda x: x, {'image': jnp.ones((3, 4)), 'label': labels})
    number, value = run_checks(output.checks, jnp.ones(3))
    assert (int(number), float(value)) == (1, bad)
    labels = labels.at[2, 2].set(0.5)
    output = Classification(loss=loss)(lambda x: x, {'image': jnp.ones((3, 4)), 'label': labels})
    assert run_checks(output.checks, jnp.ones(3))[0] == 0


def test_integer_labels_per_class_are_probabilities() -> None:
    labels = jax.nn.one_hot(jnp.array([1, 2, 0]), 4)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    losses = [
        Classification()(lambda x: x, {'image': logits, 'label': labels.astype(kind)}).loss
        for kind in (jnp.float32, jnp.int32, bool)
    ]
    np.testing.assert_array_equal(losses[0], losses[1])
    np.testing.assert_array_equal(losses[0], losses[2])


def test_ignore_label_must_fit_into_the_dtype() -> None:
    batch = {'image': jnp.zeros((3, 4)), 'label': jnp.array([0, 255, 1], jnp.uint8)}
    with pytest.raises(UserError, match='ignore_label: -1 cannot occur'):
        Classification(ignore_label=-1)(lambda x: x, batch)
    output = Classification(ignore_label=255)(lambda x: x, batch)
    assert output.weights.tolist() == [1, 0, 1]


def test_softmax_of_one_logit_is_rejected() -> None:
    batch = {'image': jnp.zeros((3, 1)), 'label': jnp.zeros((3, 1))}
    with pytest.raises(UserError, match='whose softmax is always 1'):
        Classification()(lambda x: x, batch)


def test_a_binary_decision_with_another_label_is_found() -> None:
    batch = {'image': jnp.zeros((3, 1)), 'label': jnp.array([0, 2, 1])}
    output = Classification(loss='sigmoid')(lambda x: x, batch)
    number, value = run_checks(output.checks, jnp.ones(3))
    assert (int(number), float(value)) == (1, 2)


@pytest.mark.parametrize('smoothing', [-1.0, 1.0, 2.0])
def test_invalid_label_smoothing_is_rejected(smoothing: float) -> None:
    with pytest.raises(ValueError, match='label_smoothing: expected a number from 0 to below 1'):
        Classification(label_smoothing=smoothing)


def test_tokens_outside_the_vocabulary() -> None:
    tokens = jnp.array([[1, 2, 3], [4, 9, 0]])
    output = NextToken()(lambda x: jnp.zeros((2, 3, 5)), {'tokens': tokens})
    number, value = run_checks(output.checks, output.weights)
    assert (int(number), int(value)) == (1, 9)


def test_examples_of_weight_0_may_have_any_label() -> None:
    batch = {
        'image': jnp.zeros((3, 4)),
        'label': jnp.array([0, 77, 1]),
        'w': jnp.array([1.0, 0, 1]),
    }
    output = Classification(weight='w')(lambda x: x, batch)
    assert run_checks(output.checks, output.weights)[0] == 0
    output = Classification()(lambda x: x, batch)
    assert run_checks(output.checks, jnp.ones(3))[1] == 77
