# SPDX-License-Identifier: Apache-2.0
"""Data with 64-bit ids and text that no task reads, for the tests and their config."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from trainer.data.sources import Arrays, ArraySource
from trainer.tasks import Classification, TaskOutput

FIRST = 2**40
HOST = ('id', 'share', 'name', 'raw')


class Rows(ArraySource):
    """Four classes of points, with fields that no task computes with.

    Fields: x, float32; label, int64; id, int64 beyond 32 bits; share, float64 beyond float32; name,
    text; raw, bytes as objects.
    """

    def __init__(self, n: int = 77, *, seed: int = 0, label: int | None = None):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 4, n)
        x = 2 * np.eye(8)[labels] + rng.normal(size=(n, 8))
        if label is not None:
            labels[n // 2] = label
        super().__init__(
            {
                'x': x.astype(np.float32),
                'label': labels.astype(np.int64),
                'id': FIRST + np.arange(n),
                'share': 10.0 ** -np.arange(n).astype(np.float64) * 1e300,
                'name': np.array([f'number {i}' for i in range(n)]),
                'raw': np.array([f'é{i}'.encode() for i in range(n)], object),
            }
        )


class Numbered(Classification):
    """Returns the fields together with the predictions."""

    def predict(self, model: Any, batch: Any) -> dict[str, Any]:
        return {**super().predict(model, batch), **{name: batch[name] for name in HOST}}


class Weighted(Numbered):
    """Half of the examples have weight 0."""

    def __call__(self, model: Any, batch: Any) -> TaskOutput:
        output = super().__call__(model, batch)
        return dataclasses.replace(output, weights=batch['x'][:, 0] > 0)


class Computing(Classification):
    """Computes with the labels and returns them unchanged."""

    def predict(self, model: Any, batch: Any) -> dict[str, Any]:
        hits = model(batch['x']).argmax(-1) == batch['label']
        return {'hit': hits, 'label': batch['label'], 'doubled': 2 * batch['label']}


class Wrong(Classification):
    """Computes with ids that devices cannot store."""

    def predict(self, model: Any, batch: Any) -> dict[str, Any]:
        return {'class': model(batch['x']).argmax(-1), 'group': batch['id'] % 7}


class OnlyIds(Classification):
    """Computes nothing."""

    def predict(self, model: Any, batch: Any) -> dict[str, Any]:
        return {'id': batch['id']}


def center(batch: Any) -> dict[str, Any]:
    """A device transform that returns all fields."""
    return {**batch, 'x': batch['x'] - jnp.mean(batch['x'])}


def step_by_hand(state: Any, batch: Any, ctx: Any) -> Any:
    """A step that reads one field itself."""
    grads, collections, metrics = ctx.gradients(state, batch)
    state, more = ctx.update(state, grads, collections)
    return state, {**metrics, **more, 'largest': jnp.max(batch['x'])}


def everything(state: Any, batch: Any, ctx: Any) -> Any:
    """A step that reads all fields."""
    doubled = jax.tree.map(lambda x: 2 * x, batch)
    return step_by_hand(state, doubled, ctx)


def as_text(batch: Arrays) -> Arrays:
    """A transform that turns numbers into Python objects."""
    items = [json.dumps(row) for row in batch['x'].tolist()]
    return {**batch, 'name': np.array(items, object)}


def constant(function: str) -> Callable[..., Any]:
    """Returns a function of this module, for a config that names it."""
    return globals()[function]


def get_config() -> ml_collections.ConfigDict:
    here = 'tests.evaluate.rows'
    c = ml_collections.ConfigDict()
    c.train_for = '12 steps'
    c.model = dict(target='trainer.models.mlp:MLP', features=(16, 4))
    c.task = dict(target=f'{here}:Numbered', inputs='x')
    c.data = dict(source=dict(target=f'{here}:Rows', n=100), batch_size=16)
    c.evals = dict(
        test=dict(every='never', data=dict(source=dict(target=f'{here}:Rows', n=77), batch_size=32))
    )
    c.optimizer = dict(target='optax:sgd', learning_rate=0.1)
    c.log = dict(every='6 steps', tensorboard=False)
    return c
