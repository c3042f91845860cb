# SPDX-License-Identifier: Apache-2.0
"""The network of Flax's guide to Optax, trained as there: one epoch of MNIST in its own order."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import ml_collections
from flax import traverse_util

from trainer.config.loading import LoadedConfig
from trainer.experiment import build
from trainer.trainer import Trainer


class Perceptron(nn.Module):
    """784-50-10, whatever `units` is: the class of the guide ignores it, too."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(50)(x.reshape((x.shape[0], -1))))
        return nn.Dense(10)(x)


def kernels(params: Any) -> Any:
    """Returns which parameters are kernels."""
    return traverse_util.path_aware_map(lambda path, _: path[-1] == 'kernel', params)


def biases(params: Any) -> Any:
    """Returns which parameters are biases, by their flattened paths."""
    flat = {path: path[-1] == 'bias' for path in traverse_util.flatten_dict(params)}
    return traverse_util.unflatten_dict(flat)


def labels(params: Any) -> Any:
    """Returns 'kernel' or 'bias' for each parameter."""
    return traverse_util.path_aware_map(lambda path, _: path[-1], params)


def trainer(optimizer: dict[str, Any], **options: Any) -> Trainer:
    """Returns the trainer: 469 steps of 128 images, the last one of 96."""
    config = ml_collections.ConfigDict()
    config.train_for = '1 epoch'
    config.model = {'target': f'{__name__}:Perceptron'}
    config.task = {'target': 'trainer.tasks:Classification'}
    config.optimizer = optimizer
    to_float = {'target': 'trainer.data.transforms:ToFloat'}
    source = {'target': 'trainer.data.mnist:MNIST'}
    config.data = {
        'source': {**source, 'split': 'train'}, 'device_transforms': (to_float,),
        'batch_size': 128, 'shuffle': False, 'remainder': 'pad',
    }  # fmt: skip
    data = {'source': {**source, 'split': 'test'}, 'device_transforms': (to_float,)}
    config.evals = {'test': {'data': {**data, 'batch_size': 2000}, 'every': 'never'}}
    config.log = {'every': '100 steps'}
    # Bit-equal comparisons: XLA fuses products and sums differently in steps that can stop.
    config.guard = {'non_finite': 'warn'}
    for name, value in options.items():
        config[name] = value
    path = pathlib.Path(__file__)
    return Trainer(build(LoadedConfig(config=config, name=path.stem, arg='', path=path)))
