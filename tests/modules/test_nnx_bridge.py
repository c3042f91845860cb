# SPDX-License-Identifier: Apache-2.0
"""Linen modules within NNX modules and vice versa (`flax.nnx.bridge`)."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.modules.examples import X, bind, init, same
from tests.modules.test_nnx_trainer import experiment
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys
from trainer.trainer import Trainer


class LinenInside(nnx.Module):
    """A bridge whose parameters are created at its first input."""

    def __init__(self, rngs: nnx.Rngs):
        self.linen = nnx.bridge.ToNNX(nn.Dense(16), rngs=rngs)
        self.out = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.linen(x.reshape(len(x), -1))))


class Count(nnx.Variable):
    """The number of calls of a module."""


class Moving(nnx.Module):
    """Bridges, and everything else that a training call updates."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.count = Count(jnp.zeros((), jnp.int32))
        self.calls = jnp.zeros(())
        self.linen = nnx.bridge.ToNNX(nn.Sequential([nn.Dense(3), nn.BatchNorm()]), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count[...] += 1
        self.calls = self.calls + 1
        return self.linen(self.drop(self.norm(self.first(x))))


def twice(model: Any, batch: Any) -> Any:
    return model(batch['x']), model(batch['x'])


def with_views(model: Any, batch: Any) -> Any:
    """Uses everything that a model offers to a task."""
    output = model(batch['x'])
    assert set(model.collections) == {'batch_stats', 'count', 'buffers'}
    kernel = model.params['linen']['layers_0']['kernel']
    assert model.variables['params']['linen']['layers_0']['kernel'] is kernel
    average, stopped = model.ema(batch['x']), model.stop_gradient('linen/.*')(batch['x'])
    return output, average, stopped, (kernel**2).sum()


@pytest.mark.parametrize('task', [twice, with_views])
def test_initialization_updates_nothing(task: Any) -> None:
    """Bridges are initialized by a call, which leaves all other variables unchanged."""
    variables = init(Moving, task)
    made = Moving(nnx.Rngs(0))
    assert variables['count']['count'] == 0
    assert variables['buffers']['calls'] == 0
    for name in ('mean', 'var'):
        expected = getattr(made.norm, name)[...]
        assert same(variables['batch_stats']['norm'][name], expected)
        assert same(variables['batch_stats']['linen']['layers_1'][name], expected[:3])
    model: Any = as_functional(Moving)
    model.init(task, {'x': X}, Keys(seed=0, mode='init'))
    bound = model.bind(variables, Keys(seed=0, mode='train'), ema=variables['params'])
    task(bound, {'x': X})
    assert bound.collections['count']['count'] == (2 if task is twice else 3)


class Inner(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(784, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


class NNXInside(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.bridge.to_linen(Inner)(x.reshape(len(x), -1))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['LinenInside', 'NNXInside'])
def test_bridges_train(name: str, tmp_path: pathlib.Path) -> None:
    """Either system within the other."""
    made = experiment(f'{__name__}:{name}', checkpoint__every='10 steps')
    result = Trainer(made, str(tmp_path)).fit()
    assert result.metrics['train/loss'] < 2.3
    restored = Trainer(made, str(tmp_path)).restore()
    for a, b in zip(
        jax.tree.leaves(restored.params), jax.tree.leaves(result.state.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


class NamedInner(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ('embed', 'mlp'))
        self.linear = nnx.Linear(784, 16, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


class NamedInside(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = nnx.bridge.to_linen(NamedInner, name='inner')
        return nn.Dense(10)(nn.relu(inner(x.reshape(len(x), -1))))


@pytest.mark.slow
@pytest.mark.parametrize('rules', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_names_of_dimensions_within_a_linen_module(rules: bool) -> None:
    """They follow the rules; without rules they are not taken for mesh axes."""
    by_name = {
        'target': 'trainer.sharding:ByName',
        'rules': (('embed', None), ('mlp', 'model')),
    }
    made = experiment(
        f'{__name__}:NamedInside', sharding=(by_name,) if rules else 'replicated',
        mesh={'data': 4, 'model': 2},
    )  # fmt: skip
    result = Trainer(made).fit()
    assert result.metrics['train/loss'] < 2.3
    kernel = result.state.params['inner']['linear']['kernel']
    assert kernel.sharding.spec == (P(None, 'model') if rules else P())
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(784, 8 if rules else 16)}


class InCall(nn.Module):
    """A Linen module with a training flag in its call."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        self.sow('intermediates', 'mean', x.mean())
        return nn.Dropout(self.rate, deterministic=not train)(x)


class InField(nn.Module):
    """A Linen module with a training flag in a field."""

    rate: float = 0.0
    deterministic: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=self.deterministic)(nn.Dense(5)(x))
        self.sow('intermediates', 'mean', x.mean())
        return nn.Dropout(self.rate, deterministic=self.deterministic)(x)


class Around(nnx.Module):
    """A bridge in a submodule."""

    def __init__(self, linen: nn.Module, rngs: nnx.Rngs):
        self.linen = nnx.bridge.ToNNX(linen, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linen(x)


def layers() -> nn.Module:
    """A Linen module that does not pass the flag to its layers."""
    return nn.Sequential([nn.Dense(5), nn.Sequential([nn.BatchNorm(), nn.Dropout(0.0)])])


@pytest.mark.parametrize('linen', [InCall, InField, layers])
@pytest.mark.parametrize('depth', [0, 1])
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_a_linen_module_in_nnx_gets_the_training_flag(linen: Any, depth: int, mode: str) -> None:
    """Outputs, batch statistics and intermediates equal those of the module alone."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return Around(linen(), rngs) if depth else nnx.bridge.ToNNX(linen(), rngs=rngs)

    def inner(tree: Any) -> Any:
        return tree['linen'] if depth else tree

    system = as_functional(make)
    variables = system.init(lambda m, b: m(b['x']), {'x': X}, Keys(seed=0, mode='init'))
    alone = {name: inner(tree) for name, tree in variables.items()}
    keys = Keys(seed=0, mode=mode)
    model: Any = system.bind(variables, keys)
    expected = as_functional(linen()).bind(alone, keys)
    np.testing.assert_allclose(model(X), expected(X), rtol=1e-5, atol=1e-6)
    found = inner(model.collections['batch_stats'])
    jax.tree.map(np.testing.assert_allclose, found, expected.collections['batch_stats'])
    moved = not same(jax.tree.leaves(found)[0], jnp.zeros(5))  # The mean comes first.
    assert moved == (mode == 'train')
    if linen is not layers:
        assert len(inner(model.intermediates)['mean']) == 1


def test_dropout_of_a_linen_module_in_nnx() -> None:
    system = as_functional(lambda rngs: Around(InCall(rate=0.5), rngs))
    variables = system.init(lambda m, b: m(b['x']), {'x': X}, Keys(seed=0, mode='init'))
    model = system.bind(variables, Keys(seed=0, mode='train'))
    first, second = model(X), model(X)
    assert (first == 0).any() and not same(first == 0, second == 0)
    evaluated = system.bind(variables, Keys(seed=0, mode='eval'))
    assert same(evaluated(X), evaluated(X)) and not (evaluated(X) == 0).any()


class Flagged(nnx.Module):
    """An NNX module with layers that follow the mode, a flag in its call, and noise."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x: jax.Array, *, training: bool) -> Any:
        noise = self.rngs.noise.normal((5,))
        return self.drop(self.norm(self.linear(x))), noise if training else -noise

    def plain(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


class AroundFlagged(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        return nnx.bridge.to_linen(Flagged, name='inner')(x)


@pytest.mark.parametrize('module', [nnx.bridge.to_linen(Flagged), AroundFlagged()])
def test_an_nnx_module_in_linen_gets_the_training_flag(module: nn.Module) -> None:
    """Batch statistics and dropout follow the flag."""
    model, evaluated = bind(module), bind(module, 'eval')
    before = jax.tree.map(np.asarray, evaluated.collections)
    (first, noise), (second, other) = model(X), model(X)
    assert (first == 0).any() and not same(first == 0, second == 0)
    assert not same(noise, other)
    moved = jax.tree.leaves(model.collections['batch_stats'])
    fresh = jax.tree.leaves(before['batch_stats'])
    assert not any(same(a, b) for a, b in zip(moved, fresh, strict=True))
    assert not same(-noise, evaluated(X)[1])
    assert same(evaluated(X)[0], evaluated(X)[0]) and not (evaluated(X)[0] == 0).any()
    jax.tree.map(np.testing.assert_array_equal, evaluated.collections, before)
    for mode, before in (('train', noise), ('eval', evaluated(X)[1])):
        later = as_functional(module).bind(init(module), Keys(seed=0, mode=mode, step=4))
        assert not same(later(X)[1], before)


def test_methods_of_an_nnx_module_in_linen() -> None:
    model = bind(nnx.bridge.to_linen(Flagged))
    linear = model.params['linear']
    expected = X @ linear['kernel'] + linear['bias']
    np.testing.assert_allclose(model.plain(X), expected, rtol=1e-5)
