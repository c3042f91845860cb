# SPDX-License-Identifier: Apache-2.0
"""A head trained on precomputed features equals the head on a frozen backbone."""

from __future__ import annotations

import pathlib

import flax.linen as nn
import flax.serialization
import jax
import numpy as np
import pytest

from tests.weights.examples import Points, assert_same, trainer
from trainer import precompute
from trainer.config.errors import UserError
from trainer.data.npz import Npz
from trainer.tasks import Features

FEATURES = 'trainer.tasks:Features'


class Tuned(nn.Module):
    """A backbone without batch statistics, and a head."""

    def setup(self) -> None:
        self.backbone = nn.Dense(16)
        self.head = nn.Dense(3)

    def features(self, x: jax.Array) -> jax.Array:
        return nn.relu(self.backbone(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.features(x))


@pytest.mark.slow
def test_features_computed_once(tmp_path: pathlib.Path) -> None:
    """The same head after the same steps, without the backbone in the step."""
    whole = trainer(
        tmp_path, train_for='40 steps', model={'target': f'{__name__}:Tuned'},
        optimizer__freeze='backbone/.*', optimizer__target='optax:sgd',
        evals={'features': {'every': 'never', 'final': False, 'task': {'target': FEATURES},
                            'data': {'source': {'target': 'tests.weights.examples:Points'},
                                     'batch_size': 48}}},
    )  # fmt: skip
    start = whole.init_state()
    arrays = precompute(whole, 'features', tmp_path / 'new' / 'features.npz')
    assert arrays['features'].shape == (256, 16)
    points = Points().gather(np.arange(256))
    np.testing.assert_array_equal(arrays['label'], points['label'])
    expected = Tuned().apply({'params': start.params}, points['image'], method='features')
    np.testing.assert_allclose(arrays['features'], expected, atol=1e-6)

    weights = tmp_path / 'start.msgpack'
    weights.write_bytes(flax.serialization.to_bytes({'params': start.params}))
    head = trainer(
        tmp_path, train_for='40 steps', model={'target': 'flax.linen:Dense', 'features': 3},
        task__inputs='features', optimizer__target='optax:sgd',
        data__source={
            'target': 'trainer.data.npz:Npz', 'path': str(tmp_path / 'new' / 'features.npz')
        },
        init_from={'path': str(weights), 'at': 'params/head'},
    )  # fmt: skip
    assert_same(head.init_state().params, start.params['head'])
    end = head.fit().state.params
    for name, x in whole.fit().state.params['head'].items():
        np.testing.assert_allclose(end[name], x, atol=1e-5)
        assert abs(np.asarray(x) - start.params['head'][name]).max() > 0.01


@pytest.mark.slow
def test_the_features_of_a_trained_state(tmp_path: pathlib.Path) -> None:
    data = {'source': {'target': 'tests.weights.examples:Points'}, 'batch_size': 64}
    run = trainer(
        tmp_path, 'run', model={'target': f'{__name__}:Tuned'},
        evals={'features': {'data': data, 'task': {'target': FEATURES, 'keep': ()}}},
    )  # fmt: skip
    result = run.fit()
    arrays = precompute(run, 'features', tmp_path / 'f.npz', result.state)
    image = Points().gather(np.arange(256))['image']
    params = jax.device_get(result.state.params)
    expected = Tuned().apply({'params': params}, image, method='features')
    np.testing.assert_allclose(arrays['features'], expected, atol=1e-5)
    assert set(np.load(tmp_path / 'f.npz')) == set(Npz(tmp_path / 'f.npz').spec) == {'features'}
    assert len(Npz(tmp_path / 'f.npz', limit=7)) == 7
    with pytest.raises(UserError, match=r"no evaluation 'feature'; config\.evals has features"):
        precompute(run, 'feature', tmp_path / 'f.npz')
    with pytest.raises(
        UserError, match=r"Features: the model has no method 'feats'; set the argument"
    ):
        Features(method='feats').predict(run.model(result.state), {'label': image})
    # As an evaluation it measures what the features are like.
    mean = (np.asarray(expected) ** 2).mean()
    assert result.metrics['eval/features/loss'] == pytest.approx(mean, rel=1e-5)
