# SPDX-License-Identifier: Apache-2.0
"""The linear probe: equal to its definition, and as a score of a run."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import numpy as np
import pytest

from tests.small import trainer_in
from trainer.config.errors import UserError
from trainer.evaluate.linear_probe import classify
from trainer.scores import LinearProbe


class Pixels(nn.Module):
    """Features are the pixels."""

    def features(self, x: Any) -> Any:
        return x.reshape(len(x), -1)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(10)(self.features(x))


def examples(per_class: int, queries: int, width: int = 6, noise: float = 1.0) -> Any:
    """Returns examples of four classes around centers of their own."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, width))
    label = np.concatenate([np.tile(np.arange(4), per_class), rng.integers(0, 4, queries)])
    shot = np.concatenate([np.repeat(np.arange(per_class), 4), np.full(queries, -1)])
    features = centers[label] + noise * rng.normal(size=(len(label), width))
    return {'features': features.astype('f4'), 'label': label, 'shot': shot}


def reference(features: Any, labels: Any, queries: Any) -> Any:
    """The definition: solves the normal equations, once for each example that is left out."""
    mean, std = features.mean(0), features.std(0)
    x, z = (features - mean) / std, (queries - mean) / std
    y = np.eye(labels.max() + 1)[labels]
    unit = np.square(np.linalg.svd(x, compute_uv=False)).max()

    def fit(rows: Any, penalty: float) -> Any:
        center, target = x[rows].mean(0), y[rows].mean(0)
        a = x[rows] - center
        weights = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ (y[rows] - target))
        return lambda new: (new - center) @ weights + target

    def error(penalty: float) -> float:
        others = [np.arange(len(x)) != i for i in range(len(x))]
        return sum(np.square(fit(rows, penalty)(x[~rows]) - y[~rows]).sum() for rows in others)

    best = min((10.0 ** (i / 2) * unit for i in range(-12, 5)), key=error)
    return fit(np.full(len(x), True), best)(z).argmax(1)


@pytest.mark.parametrize(('per_class', 'width'), [(5, 6), (3, 30), (10, 3)])
def test_classes_are_those_of_the_definition(per_class: int, width: int) -> None:
    """Also with more features than examples."""
    given = examples(per_class, 200, width)
    features, label = given['features'].astype(float), given['label']
    seen = given['shot'] >= 0
    found = classify(features[seen], label[seen], features[~seen])
    expected = reference(features[seen], label[seen], features[~seen])
    np.testing.assert_array_equal(found, expected)
    assert 0.3 < (found == label[~seen]).mean() < 1


def test_accuracy_for_each_number_of_shots() -> None:
    probe = LinearProbe(shots=(1, 5, 20))
    found = probe(examples(20, 500))
    assert list(found) == ['1_shot', '5_shot', '20_shot']
    assert 0.25 < found['1_shot'] < found['5_shot'] < found['20_shot']
    assert probe(examples(20, 500, noise=1e-3)) == {'1_shot': 1, '5_shot': 1, '20_shot': 1}


def test_features_of_any_shape_and_scale() -> None:
    """A feature that never changes does not count, and scales do not matter."""
    given = examples(10, 300)
    expected = LinearProbe()(given)
    changed = np.concatenate([given['features'] * 1024, np.full((340, 6), 4.0)], axis=1)
    assert LinearProbe()({**given, 'features': changed.reshape(340, 3, 4)}) == expected
    constant = np.ones((340, 6), np.float32)
    assert LinearProbe(shots=(10,))({**given, 'features': constant})['10_shot'] < 0.5


def test_features_that_are_not_finite() -> None:
    given = examples(10, 30)
    given['features'][3, 1] = np.inf
    assert np.isnan(list(LinearProbe()(given).values())).all()


@pytest.mark.parametrize(
    ('remove', 'probe', 'message'),
    [
        ('shot', {}, r"no 'shot' among .*: .* task trainer.tasks:Features .*'label', 'shot'\)"),
        ('features', {}, r"no 'features' among the predictions, label, shot: "),
        ('', {'shots': (3,)}, r'shots=\(3,\), but the data has 2 .* trainer.data.few_shot:FewShot'),
    ],
)
def test_what_is_missing_is_named(remove: str, probe: Any, message: str) -> None:
    given = {name: x for name, x in examples(2, 5).items() if name != remove}
    with pytest.raises(UserError, match=message):
        LinearProbe(**{'shots': (1,), **probe})(given)


@pytest.mark.parametrize('shots', [(), (0,), (1.5,)])
def test_invalid_shots(shots: Any) -> None:
    with pytest.raises(ValueError, match='expected a tuple of positive integers'):
        LinearProbe(shots=shots)


@pytest.mark.slow
def test_the_score_of_a_run() -> None:
    """Pixels of ten digits of each class: far above one in ten."""
    mnist = {'target': 'trainer.data.mnist:MNIST'}
    trainer = trainer_in(
        None,
        train_for='2 steps',
        model={'target': 'tests.evaluate.test_linear_probe:Pixels'},
        evals__probe={
            'task': {'target': 'trainer.tasks:Features', 'keep': ('label', 'shot')},
            'data': {
                'source': {
                    'target': 'trainer.data.few_shot:FewShot',
                    'train': {**mnist, 'split': 'train', 'limit': 1000},
                    'test': {**mnist, 'split': 'test', 'limit': 300},
                    'num_classes': 10,
                },
                'device_transforms': ({'target': 'trainer.data.transforms:ToFloat'},),
                'batch_size': 100,
            },
            'score': {'target': 'trainer.scores:LinearProbe'},
        },
    )
    metrics = trainer.fit().metrics
    assert metrics['eval/probe/examples'] == 400
    assert 0.25 < metrics['eval/probe/1_shot'] < metrics['eval/probe/10_shot'] < 0.9
    assert metrics['eval/probe/10_shot'] > 0.55
