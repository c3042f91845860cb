# SPDX-License-Identifier: Apache-2.0
"""NNX modules as functions of their variables."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.modules.examples import X, bind, init, same
from trainer.config.errors import UserError
from trainer.klinen.notebook import bind_for_notebook
from trainer.modules.functional import as_functional
from trainer.modules.precision import Precision
from trainer.modules.rng import Keys


class Count(nnx.Variable):
    """The number of calls of a module."""


class Model(nnx.Module):
    """Batch statistics, two dropouts, a counter and intermediates of both kinds."""

    width = 5

    def __init__(self, rate: float = 0.5, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drops = nnx.List([nnx.Dropout(rate, rngs=rngs) for _ in range(2)])
        self.calls = Count(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        y = self.norm(self.first(x))
        self.sow(nnx.Intermediate, 'sown', y.mean())
        self.assigned = nnx.Intermediate(y.sum())
        return jnp.stack([drop(jnp.ones_like(y)) * y for drop in self.drops])

    def encode(self, x: jax.Array) -> jax.Array:
        return self.first(x)


def make(rngs: nnx.Rngs) -> Model:
    return Model(rngs=rngs)


def test_variables_by_collection_and_path() -> None:
    """Nested dicts by name, without RNG state."""
    variables = init(make)
    assert set(variables) == {'params', 'batch_stats', 'count'}
    assert set(variables['params']) == {'first', 'norm'}
    assert set(variables['batch_stats']['norm']) == {'mean', 'var'}
    assert variables['count']['calls'] == 0
    again = init(make)
    jax.tree.map(lambda a, b: same(a, b) or pytest.fail('differs'), variables, again)
    kernel = as_functional(make).init(lambda *_: None, {}, Keys(seed=1, mode='init'))
    assert not same(kernel['params']['first']['kernel'], variables['params']['first']['kernel'])


def test_training_updates_variables() -> None:
    """Training updates counter and statistics, evaluation neither."""
    model = bind(make)
    model(X), model(X)
    assert model.collections['count']['calls'] == 2
    assert not same(model.collections['batch_stats']['norm']['mean'], jnp.zeros(5))
    evaluated = bind(make, 'eval')
    before = jax.tree.map(np.asarray, evaluated.collections)
    first, second = evaluated(X), evaluated(X)
    assert same(first, second) and same(first[0], first[1])
    jax.tree.map(np.testing.assert_array_equal, evaluated.collections, before)


def test_dropout_keys() -> None:
    """Reproducible, and different for each layer, call, step and micro-batch."""
    one, other = bind(make), bind(make)
    a, b = one(X), one(X)
    assert same(a, other(X))
    masks = [a[0] == 0, a[1] == 0, b[0] == 0, b[1] == 0]
    for i, mask in enumerate(masks):
        assert 0 < mask.sum() < mask.size
        assert not any(same(mask, rest) for rest in masks[i + 1 :])
    variables = init(make)
    for keys in (Keys(seed=0, mode='train', step=4), Keys(seed=0, mode='train', step=3, index=1)):
        elsewhere = as_functional(make).bind(variables, keys)(X)
        assert not same(elsewhere[0] == 0, masks[0])


@pytest.mark.filterwarnings("ignore:\\s*Using 'Module")
def test_intermediates_are_not_in_the_state() -> None:
    """Sown and assigned values."""
    model: Any = bind(make)
    model(X)
    assert set(model.intermediates) == {'sown', 'assigned'}
    assert len(model.intermediates['sown']) == 1
    model(X)  # Replaces the intermediates of the first call.
    assert len(model.intermediates['sown']) == 1
    module: Any = bind_for_notebook(as_functional(make), model.variables)
    assert not hasattr(module, 'assigned')
    module(X)
    assert set(nnx.to_pure_dict(nnx.pop(module, nnx.Intermediate))) == {'sown', 'assigned'}
    assert not hasattr(module, 'assigned') and not hasattr(module, 'sown')
    assert set(model.collections) == {'batch_stats', 'count'}


def test_submodules_methods_and_plain_fields() -> None:
    model = bind(make, 'eval')
    kernel, bias = (model.params['first'][name] for name in ('kernel', 'bias'))
    np.testing.assert_allclose(model.first(X), X @ kernel + bias, rtol=1e-5)
    assert same(model.encode(X), model.first(X))
    assert model.width == 5
    assert same(model.drops[0](X), X)


def test_views() -> None:
    variables = init(make)
    zeros = jax.tree.map(jnp.zeros_like, variables['params'])

    def loss(params: Any) -> Any:
        keys = Keys(seed=0, mode='train')
        model = as_functional(make).bind({**variables, 'params': params}, keys, ema=zeros)
        assert same(model.ema.encode(X), jnp.zeros((3, 5)))
        return model.stop_gradient('first/bias').encode(X).sum()

    grads = jax.grad(loss)(variables['params'])
    assert same(grads['first']['bias'], jnp.zeros(5))
    assert not same(grads['first']['kernel'], jnp.zeros((4, 5)))
    with pytest.raises(UserError, match='matches no parameter'):
        bind(make).stop_gradient('nothing')


class Shared(nnx.Module):
    """A linear layer that is used twice."""

    def __init__(self, rngs: nnx.Rngs):
        self.one = nnx.Linear(4, 4, rngs=rngs)
        self.two = self.one

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.two(self.one(x))


def test_a_shared_module_has_one_set_of_parameters() -> None:
    variables = init(Shared)
    assert len(jax.tree.leaves(variables['params'])) == 2
    kernel, bias = variables['params']['one']['kernel'], variables['params']['one']['bias']

    def mine(params: Any) -> Any:
        bound = as_functional(Shared).bind({'params': params}, Keys(seed=0, mode='train'))
        return bound(X).sum()

    grads = jax.grad(mine)(variables['params'])
    expected = jax.grad(lambda k: ((X @ k + bias) @ k + bias).sum())(kernel)
    np.testing.assert_allclose(grads['one']['kernel'], expected, rtol=1e-5)


class Stacked(nnx.Module):
    """Five layers created by `nnx.vmap` and run by `nnx.scan`, each with its own dropout."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=5)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def layers(rngs: nnx.Rngs) -> Layer:
            return Layer(rngs)

        self.layers = layers(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def run(x: jax.Array, layer: Layer) -> Any:
            mask = layer.drop(jnp.ones(20))
            return nnx.relu(layer.linear(x)), mask

        return run(x, self.layers)[1]


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def test_scanned_layers() -> None:
    model = bind(Stacked)
    assert model.params['layers']['linear']['kernel'].shape == (5, 4, 4)
    kernels = model.params['layers']['linear']['kernel']
    assert not same(kernels[0], kernels[1])
    masks = np.asarray(model(X))
    assert len(np.unique(masks, axis=0)) == 5


class Growing(nnx.Module):
    def __init__(self, new: Any, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.make = new

    def __call__(self, x: jax.Array) -> jax.Array:
        self.new = self.make(x.sum())
        return self.linear(x)


@pytest.mark.parametrize('run', [lambda f: f, jax.jit], ids=['as it is', 'traced'])
@pytest.mark.parametrize('new', [Count, lambda x: x], ids=['variable', 'array'])
def test_variables_created_in_a_call_are_an_error(new: Any, run: Any) -> None:
    """They would be missing in the next step."""
    with pytest.raises(ValueError, match=r'that a call creates must be nnx\.Intermediate'):
        run(lambda x: bind(lambda rngs: Growing(new, rngs))(x))(X)


def test_dtypes() -> None:
    precision = Precision(params=jnp.float32, compute=jnp.bfloat16, output=jnp.float32)
    model = as_functional(make, precision)
    variables = model.init(lambda *_: None, {}, Keys(seed=0, mode='init'))
    bound = model.bind(variables, Keys(seed=0, mode='train'))
    assert bound(X).dtype == jnp.float32
    assert bound.collections['batch_stats']['norm']['mean'].dtype == jnp.float32
    exact = as_functional(make).bind(variables, Keys(seed=0, mode='train'))(X)
    assert not same(bound(X), exact)
