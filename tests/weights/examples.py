# SPDX-License-Identifier: Apache-2.0
"""A small model with a backbone and a head, and runs of it."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from trainer.data.sources import ArraySource
from trainer.experiment import load_and_build
from trainer.trainer import Trainer
from trainer.weights.first_state import load_initial_weights
from trainer.weights.init_from import InitFrom

CONFIG = """
import ml_collections


def get_config():
    c = ml_collections.ConfigDict()
    c.train_for = '10 steps'
    c.model = dict(target='tests.weights.examples:Net')
    c.task = dict(target='trainer.tasks:Classification')
    c.optimizer = dict(target='optax:adam', learning_rate=0.01)
    c.data = dict(source=dict(target='tests.weights.examples:Points'), batch_size=16)
    c.log = dict(every='5 steps', tensorboard=False)
    return c
"""


class Backbone(nn.Module):
    """Two dense layers with batch norm."""

    width: int = 12

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x)))
        return nn.relu(nn.Dense(self.width)(x))


class Net(nn.Module):
    """A backbone, optional position embeddings, and a head."""

    classes: int = 3
    width: int = 12
    positions: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = Backbone(self.width, name='backbone')(x, train)
        if self.positions is not None:
            init = nn.initializers.normal()
            x = x + self.param('positions', init, (self.positions, self.width)).sum(0)
        return nn.Dense(self.classes, name='head')(x)


class Points(ArraySource):
    """Clusters of points, one for each class."""

    def __init__(self, classes: int = 3):
        rng = np.random.default_rng(0)
        label = rng.integers(0, classes, 256)
        centre = rng.normal(size=(classes, 8))[label]
        image = (centre + 0.3 * rng.normal(size=(256, 8))).astype('f4')
        super().__init__({'image': image, 'label': label.astype('i4')})


def trainer(directory: pathlib.Path, workdir: str | None = None, **overrides: Any) -> Trainer:
    """Returns a trainer of the small model; `overrides` as `load_and_build` takes them."""
    file = directory / 'net.py'
    file.write_text(CONFIG)
    experiment = load_and_build(str(file), **overrides)
    return Trainer(experiment, None if workdir is None else str(directory / workdir))


def pretrain(directory: pathlib.Path, **overrides: Any) -> tuple[str, Any]:
    """Returns the work directory of a run of ten steps, and its last state on the host."""
    result = trainer(directory, 'pretrained', **overrides).fit()
    return str(directory / 'pretrained'), jax.device_get(result.state)


def initial_state(run: Trainer, **init_from: Any) -> Any:
    """Returns the initial state that a trainer would have with these options of `init_from`."""
    chosen = InitFrom(**init_from)
    return load_initial_weights(
        run.set_up().programs.init(),
        chosen,
        (),
        lambda state: run.set_up().programs.restart_optimizer(state),
    )


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator='/'): np.asarray(x) for p, x in leaves}


def assert_same(a: Any, b: Any) -> None:
    """Both trees have the same leaves, bit for bit."""
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        np.testing.assert_array_equal(x, b[path], err_msg=path)
        assert x.dtype == b[path].dtype or jnp.issubdtype(x.dtype, jnp.floating)
