# SPDX-License-Identifier: Apache-2.0
"""The patterns of the guide "Upgrading my codebase to Linen"."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from tests.modules.examples import X, bind, init
from trainer.config.loading import LoadedConfig
from trainer.data.sources import ArraySource
from trainer.experiment import build
from trainer.modules.functional import as_functional
from trainer.parallel.mesh import make_mesh
from trainer.step.context import StepContext
from trainer.step.one_model import TrainStep
from trainer.step.optimizer import Optimizer
from trainer.step.programs import Programs
from trainer.tasks import TaskOutput
from trainer.tasks.runner import TaskRunner
from trainer.trainer import Trainer


class ResNet(nn.Module):
    """The start of a residual network, with layer types in fields."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    num_filters: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.conv(self.num_filters, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name='conv_init')(
            x
        )
        x = self.norm(use_running_average=not train, name='bn_init')(x)
        return nn.Dense(2)(nn.relu(x).mean((1, 2)))


def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype('f4')


class Images(ArraySource):
    """The images, of two classes."""

    def __init__(self) -> None:
        super().__init__({'image': images(), 'label': np.arange(16) % 2})


@pytest.mark.slow
def test_partial_in_a_config() -> None:
    """`functools.partial` in place of `Module.partial`, written in the config."""
    partial = {'target': 'functools:partial', 'accepts_any': True}
    config = ml_collections.ConfigDict()
    config.train_for = '1 step'
    config.model = {
        'target': f'{__name__}:ResNet',
        'conv': {**partial, 'args': ({'ref': 'flax.linen:Conv'},), 'use_bias': False},
        'norm': {**partial, 'args': ({'ref': 'flax.linen:BatchNorm'},), 'momentum': 0.9,
                 'epsilon': 1e-5},
    }  # fmt: skip
    config.task = {'target': 'trainer.tasks:Classification'}
    config.optimizer = {'target': 'optax:sgd', 'learning_rate': 0.1}
    config.data = {'source': {'target': f'{__name__}:Images'}, 'batch_size': 16}
    path = pathlib.Path(__file__)
    trainer = Trainer(build(LoadedConfig(config=config, name=path.stem, arg='', path=path)))
    state = trainer.fit().state
    assert {name: set(part) for name, part in state.params.items()} == {
        'conv_init': {'kernel'}, 'bn_init': {'scale', 'bias'}, 'Dense_0': {'kernel', 'bias'},
    }  # fmt: skip
    assert state.params['conv_init']['kernel'].shape == (7, 7, 1, 4)
    # A step of momentum 0.9 keeps 0.9 of the first variances, which are 1.
    first = {'params': trainer.init_state().params['conv_init']}
    layer = nn.Conv(4, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False)
    variances = layer.apply(first, images()).var((0, 1, 2))
    found = state.collections['batch_stats']['bn_init']['var']
    np.testing.assert_allclose(found, 0.9 + 0.1 * variances, rtol=1e-4)


def test_initialization_runs_no_forward_pass() -> None:
    """The compiled initialization contains no forward pass; shapes need no computation."""

    def task(model: Any, batch: Any) -> TaskOutput:
        return TaskOutput(loss=model(batch['x']).mean(-1))

    model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Dense(5)])
    step = TrainStep(StepContext(
        model=as_functional(model), task=TaskRunner.from_task(task), seed=0,
        optimizer=Optimizer(base=optax.sgd(0.1))
))  # fmt: skip
    spec = {'x': jax.ShapeDtypeStruct((8, 16, 16, 1), np.float32)}
    programs = Programs(step, spec, make_mesh({'data': -1}))
    assert programs.abstract.params['layers_0']['kernel'].shape == (3, 3, 1, 8)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(programs.abstract))
    text = programs.init.executable().as_text()
    for operation in ('convolution', ' dot('):
        assert operation not in text
        assert operation in programs.step.executable().as_text()


class Counter(nn.Module):
    """A value in a custom collection that every training call changes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        calls = self.variable('counts', 'calls', functools.partial(jnp.zeros, (), jnp.int32))
        if not self.is_initializing() and self.is_mutable_collection('counts'):
            calls.value += 1
        return nn.Dense(1)(x)


@pytest.mark.parametrize(('mode', 'count'), [('train', 2), ('eval', 0)])
def test_custom_collections(mode: str, count: int) -> None:
    """Collections of any name are updated in training, and not in evaluation."""
    assert set(init(Counter())) == {'params', 'counts'}
    model = bind(Counter(), mode)
    model(X)
    model(X)
    assert int(model.collections['counts']['calls']) == count
