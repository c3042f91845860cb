# SPDX-License-Identifier: Apache-2.0
"""A config whose evaluation is scored on the host, and its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import clu.metrics
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from data.sources import ArraySource
from trainer.observe.summaries import Images
from trainer.tasks.task import TaskOutput

# Ids that devices cannot store: they must come from the host.
FIRST_ID = 2**40


class Points(ArraySource):
    """Two overlapping clouds, with ids and names."""

    def __init__(self, n: int = 64, seed: int = 0):
        rng = np.random.default_rng(seed)
        label = rng.integers(0, 2, n).astype(np.int32)
        x = rng.normal(size=(n, 4)) + label[:, None]
        super().__init__({
            'x': x.astype(np.float32),
            'label': label,
            'id': np.arange(n) + FIRST_ID,
            'name': np.array([f'point {i}' for i in range(n)]),
        })  # fmt: skip


class Net(nn.Module):
    """One layer of two logits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns float32 (batch, 2)."""
        return nn.Dense(2)(x)


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Returns the share of pairs (positive, negative) in the right order."""
    return float((scores[labels == 1][:, None] > scores[labels == 0][None]).mean())


@flax.struct.dataclass
class AUC(clu.metrics.CollectingMetric.from_outputs(('labels', 'scores', 'mask'))):  # type: ignore[misc]
    """As users of clu write it."""

    def compute(self) -> float:
        """Returns the area under the curve."""
        values = super().compute()
        keep = values['mask']
        return auc(values['labels'][keep], values['scores'][keep])


@flax.struct.dataclass
class Metrics(clu.metrics.Collection):
    """One metric that accumulates on the devices, and one that collects."""

    loss: clu.metrics.Average.from_output('loss')  # type: ignore[valid-type]
    auc: AUC


class Task:
    """Classifies points."""

    metrics = Metrics

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> TaskOutput:
        """Returns a loss for each point."""
        logits = model(batch['x'])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
        outputs = {'labels': batch['label'], 'scores': logits[:, 1] - logits[:, 0]}
        return TaskOutput(loss=loss, metrics=outputs)

    def predict(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns logits, the same in half precision, and the ids."""
        logits = model(batch['x'])
        return {'logits': logits, 'half': logits.astype(jnp.bfloat16), 'id': batch['id']}


def score(examples: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Checks that it sees the split as it is, and returns values of every kind."""
    count = len(examples['id'])
    assert examples['id'].tolist() == [FIRST_ID + i for i in range(count)]
    assert examples['name'].tolist() == [f'point {i}' for i in range(count)]
    assert examples['half'].dtype == np.float32
    margins = examples['logits'][:, 1] - examples['logits'][:, 0]
    return {
        'area': auc(examples['label'], margins),
        'count': count,
        'nested': {'mean': margins.mean()},
        'margins': margins,
        'samples': ['first', 'second'],
        'grid': Images(np.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8)),
    }


class Streaming:
    """The same area, from one batch at a time."""

    def __init__(self) -> None:
        self.batches: list[Mapping[str, np.ndarray]] = []

    def __call__(self, examples: Mapping[str, np.ndarray]) -> None:
        """Keeps a batch."""
        self.batches.append(examples)

    def close(self) -> dict[str, Any]:
        """Returns the area, and the size of the largest batch."""
        joined = {k: np.concatenate([b[k] for b in self.batches]) for k in self.batches[0]}
        return {
            'area': score(joined)['area'],
            'largest': max(len(batch['id']) for batch in self.batches),
        }


def failing(examples: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Fails, as a score of a user may."""
    raise RuntimeError(f'{len(examples["id"])} examples are too many')


def config(**evaluation: Any) -> ml_collections.ConfigDict:
    """Returns the config, with more keys of its evaluation."""
    points = f'{__name__}:Points'
    config = ml_collections.ConfigDict()
    config.train_for = '2 steps'
    config.model = dict(target=f'{__name__}:Net')
    config.task = dict(target=f'{__name__}:Task')
    config.data = dict(source=dict(target=points), batch_size=16)
    config.optimizer = dict(target='optax:sgd', learning_rate=0.1)
    config.log = dict(every='2 steps', tensorboard=False)
    config.evals = dict(
        dev=dict(
            every='2 steps',
            data=dict(source=dict(target=points, n=21, seed=1), batch_size=8),
            **evaluation,
        )
    )
    return config


def get_config(arg: str) -> ml_collections.ConfigDict:
    """Returns the config with the score of that name."""
    by = 'target' if arg == 'Streaming' else 'ref'
    return config(score={by: f'{__name__}:{arg}', 'fields': ('label', 'name')})
