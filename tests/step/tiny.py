# SPDX-License-Identifier: Apache-2.0
"""Four classes of points and a small network: runs that take a second."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from flax import nnx

from trainer.config.loading import LoadedConfig
from trainer.data.sources import ArraySource
from trainer.experiment import build
from trainer.trainer import Trainer


class Points(ArraySource):
    """Points around four centres."""

    def __init__(self, examples: int = 256, seed: int = 0):
        rng = np.random.default_rng(seed)
        label = rng.integers(0, 4, examples)
        centres = 2 * np.random.default_rng(7).normal(size=(4, 8))
        x = (centres[label] + rng.normal(size=(examples, 8))).astype('f4')
        super().__init__({'x': x, 'label': label.astype('i4')})


class Net(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4)(nn.relu(nn.Dense(16)(x)))


class NNXNet(nnx.Module):
    """The same for NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Linear(8, 16, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.body(x)))


SOURCE = {'target': f'{__name__}:Points'}
EVAL = {
    'data': {'source': {**SOURCE, 'examples': 77, 'seed': 1}, 'batch_size': 32}, 'every': 'never',
}  # fmt: skip


def trainer(workdir: pathlib.Path | None = None, **options: Any) -> Trainer:
    """Returns the trainer of 20 steps of 32 points; `options` are top-level keys of the config."""
    config = ml_collections.ConfigDict()
    config.train_for = '20 steps'
    config.model = {'target': f'{__name__}:Net'}
    config.task = {'target': 'trainer.tasks:Classification', 'inputs': 'x'}
    config.optimizer = {'target': 'optax:sgd', 'learning_rate': 0.1}
    config.data = {'source': SOURCE, 'batch_size': 32}
    config.evals = {'test': EVAL}
    config.log = {'every': '5 steps', 'tensorboard': False}
    for name, value in options.items():
        config[name] = value
    path = pathlib.Path(__file__)
    experiment = build(LoadedConfig(config=config, name=path.stem, arg='', path=path))
    return Trainer(experiment, None if workdir is None else str(workdir))
