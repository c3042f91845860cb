# SPDX-License-Identifier: Apache-2.0
"""A config whose batches are trees of several forms, with the same arrays, and its parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import ml_collections
import numpy as np
import optax

from data import nested
from data.sources import ArraySource
from trainer.tasks.task import TaskOutput

HERE = __name__
FORMS = ('flat', 'dict', 'tuple', 'list', 'named', 'mixed')
NESTED = FORMS[1:]


class Example(NamedTuple):
    """Arrays with names, and one that is absent."""

    x: Any
    z: Any
    label: Any
    absent: Any = None


@flax.struct.dataclass
class Point:
    """A pytree of a class of one's own."""

    x: Any
    z: Any


def arrays(n: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns two overlapping clouds."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n).astype(np.int32)
    x, z = (rng.normal(size=(n, 4)) + label[:, None] for _ in range(2))
    text = np.array([f'number {i}' for i in range(n)])
    return {'x': x.astype('f4'), 'z': z.astype('f4'), 'label': label, 'text': text}


def arrange(form: str, given: dict[str, Any]) -> Any:
    """Returns the arrays as a tree of a form."""
    x, z, label = (given[name] for name in ('x', 'z', 'label'))
    return {
        'flat': {'x': x, 'z': z, 'label': label},
        'dict': {'inputs': {'x': x, 'z': z}, 'label': label},
        'tuple': ((x, z), label),
        'list': [x, z, label],
        'named': Example(x, z, label),
        'mixed': {
            'pair': (x, z),
            'target': {'label': label},
            'meta': {'text': given['text'], 'none': None},
        },
        'class': {'point': Point(x, z), 'label': label},
    }[form]


def pick(form: str, batch: Any) -> tuple[Any, Any, Any]:
    """Returns x, z and label of a tree."""
    if form == 'dict':
        return batch['inputs']['x'], batch['inputs']['z'], batch['label']
    if form == 'tuple':
        (x, z), label = batch
        return x, z, label
    if form == 'list':
        return batch[0], batch[1], batch[2]
    if form == 'named':
        assert batch.absent is None
        return batch.x, batch.z, batch.label
    if form == 'mixed':
        assert batch['meta']['none'] is None
        return *batch['pair'], batch['target/label']
    if form == 'class':
        return batch['point'].x, batch['point'].z, batch['label']
    return batch['x'], batch['z'], batch['label']


class Source(ArraySource):
    """The clouds in a form."""

    def __init__(self, form: str, n: int = 64, seed: int = 0):
        super().__init__(arrange(form, arrays(n, seed)))


class Items:
    """The clouds in a form, one example after the other, with Python numbers as labels."""

    def __init__(self, form: str, n: int = 64, seed: int = 0):
        self._form, self._arrays = form, arrays(n, seed)

    def __len__(self) -> int:
        return len(self._arrays['x'])

    def __getitem__(self, i: int) -> Any:
        return arrange(self._form, {name: x[i] for name, x in self._arrays.items()})


class Net(nn.Module):
    """Two layers with dropout; two logits."""

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array, train: bool = False) -> jax.Array:
        """Returns float32 (batch, 2)."""
        hidden = nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Dense(8)(x - z)))
        return nn.Dense(2)(hidden)


class Task:
    """Classifies points."""

    def __init__(self, form: str):
        self.form = form

    def __call__(self, model: Any, batch: Any) -> TaskOutput:
        """Returns a loss for each point."""
        x, z, label = pick(self.form, batch)
        loss = optax.softmax_cross_entropy_with_integer_labels(model(x, z), label)
        return TaskOutput(loss=loss, metrics={'wrong': loss > 0.5})

    def predict(self, model: Any, batch: Any) -> dict[str, Any]:
        """Returns the logits, and a nested output."""
        x, z, label = pick(self.form, batch)
        found = {'logits': model(x, z), 'nested': {'label': label, 'pair': (x[:, 0], z[:, 0])}}
        return {**found, 'meta': batch['meta']} if self.form == 'mixed' else found


def scale_x(batch: Any) -> Any:
    """A transform of trees of any form, on the host or on the devices."""
    if isinstance(batch, np.ndarray | jax.Array):
        return batch * 2 if batch.dtype == np.float32 else batch
    return nested.map_arrays(lambda x: x * 2 if x.dtype == np.float32 else x, batch)


def get_config(form: str = 'dict') -> ml_collections.ConfigDict:
    """Returns a config of 12 steps, with an evaluation whose batches have padding."""
    config = ml_collections.ConfigDict()
    config.train_for = '12 steps'
    config.model = dict(target=f'{HERE}:Net')
    config.task = dict(target=f'{HERE}:Task', form=form)
    config.data = dict(source=dict(target=f'{HERE}:Source', form=form), batch_size=16)
    source = dict(target=f'{HERE}:Source', form=form, n=21, seed=1)
    config.evals = dict(dev=dict(every='6 steps', data=dict(source=source, batch_size=16)))
    config.optimizer = dict(target='optax:adam', learning_rate=0.01)
    config.log = dict(every='4 steps', tensorboard=False)
    return config
