# SPDX-License-Identifier: Apache-2.0
"""Transforms that run inside the compiled step."""

import jax
import numpy as np
import pytest

from tests.in_memory import make_config
from trainer.config.errors import UserError
from trainer.experiment import build, load_and_build
from trainer.trainer import Trainer


@pytest.mark.slow
def test_device_transforms_run_in_training_evaluation_and_prediction():
    common = dict(data__source__limit=200, train_for='3 steps', evals__test__data__source__limit=64)
    on_device = load_and_build('configs/mnist_mlp.py', **common)
    to_float = "[{'target': 'trainer.data.transforms:ToFloat', 'key': 'image'}]"
    on_host = load_and_build(
        'configs/mnist_mlp.py',
        data__transforms=to_float,
        data__device_transforms='[]',
        evals__test__data__transforms=to_float,
        evals__test__data__device_transforms='[]',
        **common,
    )
    assert on_device.data.spec['image'].dtype == np.uint8
    assert on_host.data.spec['image'].dtype == np.float32
    results, probabilities = [], []
    for experiment in (on_device, on_host):
        trainer = Trainer(experiment)
        results.append(trainer.fit())
        batch = next(trainer.predict('test', results[-1].state))
        probabilities.append(batch['probability'])
    np.testing.assert_array_equal(*probabilities)
    params = [jax.tree.leaves(result.state.params) for result in results]
    for a, b in zip(*params, strict=True):
        np.testing.assert_array_equal(a, b)
    assert results[0].metrics['eval/test/loss'] == results[1].metrics['eval/test/loss']


def test_an_error_of_a_device_transform_names_it():
    def shift(batch, amount):
        return {**batch, 'x': batch['x'] + amount}

    config = make_config()
    config.data.device_transforms = (lambda batch: batch, shift)
    with pytest.raises(TypeError, match='amount') as caught:
        Trainer(build(config), verbose=False).fit()
    assert any('in device_transforms[1] = ' in note for note in caught.value.__notes__)


def test_random_host_transform_is_rejected_on_devices():
    flip = "[{'target': 'trainer.data.transforms:RandomFlip'}]"
    with pytest.raises(UserError, match=r'device_transforms\[0\].*move it to config.data.transf'):
        load_and_build('configs/mnist_mlp.py', data__device_transforms=flip)
