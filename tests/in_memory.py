# SPDX-License-Identifier: Apache-2.0
"""A config without a file, as a notebook writes it, and its parts; runs take about a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax

from data.sources import ArraySource
from trainer.tasks.task import TaskOutput

HERE = __name__


class Points(ArraySource):
    """Two overlapping clouds."""

    def __init__(self, n: int = 64, seed: int = 0):
        rng = np.random.default_rng(seed)
        label = rng.integers(0, 2, n).astype(np.int32)
        x = rng.normal(size=(n, 4)) + label[:, None]
        super().__init__({'x': x.astype(np.float32), 'label': label})


def points(n: int, seed: int = 2) -> dict[str, np.ndarray]:
    """Returns the arrays of `Points`."""
    return dict(Points(n, seed).gather(np.arange(n)))


class Net(nn.Module):
    """Two layers; two logits."""

    width: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns float32 (batch, 2)."""
        return nn.Dense(2)(nn.relu(nn.Dense(self.width)(x)))


class Task:
    """Classifies points."""

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> TaskOutput:
        """Returns a loss for each point."""
        loss = optax.softmax_cross_entropy_with_integer_labels(model(batch['x']), batch['label'])
        return TaskOutput(loss=loss)

    def predict(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the logits."""
        return {'logits': model(batch['x'])}


def make_config(**changes: Any) -> ml_collections.ConfigDict:
    """Returns the config.

    Args:
        **changes: top-level keys to replace.
    """
    config = ml_collections.ConfigDict()
    config.train_for = '8 steps'
    config.vars = ml_collections.ConfigDict({'width': 8})
    config.model = dict(target=f'{HERE}:Net', width=config.vars.get_ref('width'))
    config.task = dict(target=f'{HERE}:Task')
    config.data = dict(source=dict(target=f'{HERE}:Points'), batch_size=16)
    source = dict(target=f'{HERE}:Points', n=21, seed=1)
    config.evals = dict(dev=dict(every='4 steps', data=dict(source=source, batch_size=16)))
    config.optimizer = dict(target='optax:adam', learning_rate=0.01)
    config.log = dict(every='4 steps', tensorboard=False)
    for key, value in changes.items():
        with config.ignore_type():
            config[key] = value
    if 'model' in changes:  # Nothing refers to it then.
        del config.vars
    return config
