# SPDX-License-Identifier: Apache-2.0
"""A small task that any model of vectors can learn: the quadrant of a point."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from trainer.config.loading import LoadedConfig
from trainer.data.sources import ArraySource
from trainer.experiment import build
from trainer.step.state import TrainState
from trainer.trainer import Trainer


class Points(ArraySource):
    """512 vectors of 8 numbers; the signs of the first two are the class."""

    def __init__(self) -> None:
        x = np.random.default_rng(0).normal(size=(512, 8)).astype('f4')
        label = (x[:, 0] > 0) + 2 * (x[:, 1] > 0)
        super().__init__({'image': x, 'label': label.astype('i4')})


def trainer(model: dict[str, Any], *, steps: int = 60, **options: Any) -> Trainer:
    """Returns the trainer of a model that gives four logits."""
    config = ml_collections.ConfigDict()
    config.train_for = f'{steps} steps'
    config.model = model
    config.task = {'target': 'trainer.tasks:Classification'}
    config.optimizer = {'target': 'optax:adam', 'learning_rate': 0.01}
    config.data = {'source': {'target': f'{__name__}:Points'}, 'batch_size': 64}
    config.evals = {
        'test': {
            'data': {'source': {'target': f'{__name__}:Points'}, 'batch_size': 256},
            'every': 'never',
        }
    }
    config.log = {'every': '10 steps'}
    for name, value in options.items():
        config[name] = value
    path = pathlib.Path(__file__)
    return Trainer(build(LoadedConfig(config=config, name=path.stem, arg='', path=path)))


def train_and_check(model: dict[str, Any], **options: Any) -> TrainState:
    """Trains; checks that accuracy is above chance, and that evaluation needs no keys."""
    run = trainer(model, **options)
    result = run.fit()
    assert result.metrics['eval/test/accuracy'] > 0.6, result.metrics
    return jax.device_get(result.state)
