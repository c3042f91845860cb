# SPDX-License-Identifier: Apache-2.0
"""Linen modules behind the functional interface: keys, collections, methods and views."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

from tests.modules.examples import X, bind, init, same
from trainer.config.errors import UserError
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys


class Normed(nn.Module):
    """Statistics, two RNG streams, and submodules that can be called separately."""

    fixed: bool | None = None

    def setup(self) -> None:
        self.dense = nn.Dense(4)
        self.norm = nn.BatchNorm(momentum=0.5, use_running_average=self.fixed)
        self.drop = nn.Dropout(0.5)
        self.block = Block()

    def __call__(self, x: Any, train: bool) -> Any:
        average = None if self.fixed is not None else not train
        return self.drop(self.norm(self.dense(x), use_running_average=average), not train)

    def encode(self, x: Any) -> Any:
        return self.dense(x)

    def noisy(self, x: Any, training: bool) -> Any:
        return x + jax.random.normal(self.make_rng('noise'), x.shape) * training


class Block(nn.Module):
    def setup(self) -> None:
        self.inner = nn.Dense(2)

    def __call__(self, x: Any) -> Any:
        return self.inner(x)


def everything(model: Any, batch: Any) -> Any:
    return model(batch['x']), model.block(batch['x']), model.noisy(batch['x'])


def test_methods_and_submodules() -> None:
    model = bind(Normed(), task=everything)
    dense, inner = model.params['dense'], model.params['block']['inner']
    np.testing.assert_allclose(model.encode(X), X @ dense['kernel'] + dense['bias'], rtol=1e-6)
    assert same(model.dense(X), model.encode(X))
    np.testing.assert_allclose(model.block.inner(X), X @ inner['kernel'], rtol=1e-6)
    assert same(model.block(X), model.block.inner(X))
    assert not same(model.noisy(X), X)
    assert same(bind(Normed(), 'eval', task=everything).noisy(X), X)
    with pytest.raises(AttributeError, match='nothing_such'):
        model.nothing_such(X)


def test_collections_chain_through_every_view() -> None:
    """A call of any view changes the collections that the next call of any view sees."""
    model = bind(Normed(), task=everything, ema=init(Normed(), everything)['params'])
    views = (model, model.ema, model.stop_gradient('.*'), model.ema.stop_gradient('dense.*'))
    batch = model.dense(X).mean(0)
    for calls, view in enumerate(views, start=1):
        view(X)
        expected = batch * (1 - 0.5**calls)
        for other in views:
            mean = other.collections['batch_stats']['norm']['mean']
            np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_calls_of_all_views_draw_different_numbers() -> None:
    model = bind(Normed(), task=everything, ema=init(Normed(), everything)['params'])
    views = (model, model, model.ema, model.stop_gradient('norm/.*'), model)
    masks = [np.asarray(view.drop(jnp.ones((8, 16)), deterministic=False)) for view in views]
    assert len({mask.tobytes() for mask in masks}) == len(views)
    again = bind(Normed(), task=everything)
    assert same(again.drop(jnp.ones((8, 16)), deterministic=False), masks[0])


def test_views_differ_in_their_parameters_only() -> None:
    average = jax.tree.map(jnp.zeros_like, init(Normed(), everything)['params'])
    model = bind(Normed(), 'eval', task=everything, ema=average)
    assert same(model.ema.encode(X), jnp.zeros((3, 4)))
    assert not same(model.encode(X), jnp.zeros((3, 4)))
    assert same(model.stop_gradient('dense/kernel').encode(X), model.encode(X))
    with pytest.raises(ValueError, match=r'set config\.ema\.decay'):
        _ = bind(Normed(), task=everything).ema


def test_stop_gradient_matches_full_paths() -> None:
    variables, keys = init(Normed(), everything), Keys(seed=0, mode='train')

    def loss(params: Any, pattern: str) -> Any:
        model = as_functional(Normed()).bind({**variables, 'params': params}, keys)
        return model.stop_gradient(pattern).encode(X).sum()

    grads = jax.grad(loss)(variables['params'], 'dense/kernel')
    assert not grads['dense']['kernel'].any()
    assert grads['dense']['bias'].all()
    for part_of_a_path in ('dense', 'ense/kernel'):
        with pytest.raises(UserError, match=r'no parameter.*whole path, such as .*dense/kernel'):
            loss(variables['params'], part_of_a_path)


def test_a_module_left_in_train_mode_fails_at_evaluation() -> None:
    """With Flax's own errors: immutable statistics, dropout without a key."""
    with pytest.raises(errors.ModifyScopeVariableError):
        bind(Normed(fixed=False), 'eval', task=everything)(X)
    with pytest.raises(errors.InvalidRngError, match='dropout'):
        bind(Normed(), 'eval', task=everything).drop(X, deterministic=False)


def test_keys_by_name() -> None:
    model, other = bind(Hidden()), bind(Hidden(), 'eval')
    assert model.rng('noise') != model.rng('other')
    assert model.rng('noise') == bind(Hidden()).rng('noise')
    assert model.rng('noise') != other.rng('noise')


class Parts(nn.Module):
    """Submodules in a list and in a dict, and no `__call__`."""

    width: int = 5
    activation: Any = nn.relu

    def setup(self) -> None:
        self.layers = [nn.Dense(self.width), nn.Dense(2)]
        self.heads = {'mean': nn.Dense(1), 'block': Block()}

    def embed(self, x: Any) -> Any:
        return self.layers[0](x)


def test_submodules_in_lists_and_dicts_and_plain_fields() -> None:
    def task(model: Any, batch: Any) -> Any:
        return model.embed(batch['x']), [
            model.heads[name](batch['x']) for name in ('mean', 'block')
        ]

    model = bind(Parts(), task=task)
    assert same(model.layers[0](X), model.embed(X))
    assert model.heads['mean'](X).shape == (3, 1)
    assert same(model.heads['block'].inner(X), model.heads['block'](X))
    assert (model.width, bind(Parts(width=7), task=task).width) == (5, 7)
    assert same(model.activation(-X), jnp.zeros_like(X))


def test_submodules_of_compact_methods_have_no_name() -> None:
    with pytest.raises(AttributeError, match='Dense_0'):
        bind(Hidden()).Dense_0(X)


class Hidden(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2)(x)


class Noise(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + jax.random.normal(self.make_rng('noise'), x.shape), None


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize(
    'module',
    [
        Noise,
        nn.jit(Noise),
        nn.remat(Noise),
        nn.vmap(Noise, split_rngs={'noise': True}),
        nn.scan(Noise, length=2, split_rngs={'noise': True}),
    ],
)
def test_streams_of_lifted_modules_are_learned(module: type[nn.Module], mode: str) -> None:
    model = bind(module(), mode)
    first, second = model(X)[0], model(X)[0]
    assert not same(first, X)
    assert not same(first, second)
    assert same(first, bind(module(), mode)(X)[0])


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        kernel = nn.with_partitioning(nn.initializers.ones, (None, 'model'))
        seen = self.variable(
            'seen', 'calls', nn.with_partitioning(lambda: jnp.zeros(2), ('model',))
        )
        if not self.is_initializing():
            seen.value += 1
        return x @ self.param('kernel', kernel, (4, 4))


def test_partitioned_variables_are_boxed_in_init_only() -> None:
    boxed = init(Boxed())
    assert isinstance(boxed['params']['kernel'], nn.Partitioned)
    assert isinstance(boxed['seen']['calls'], nn.Partitioned)
    variables = nn.meta.unbox(boxed)
    model = as_functional(Boxed()).bind(variables, Keys(seed=0, mode='train'))
    assert same(model(X), X @ jnp.ones((4, 4)))
    model(X)
    assert same(model.collections['seen']['calls'], jnp.full(2, 2.0))


class Lifted(nn.Module):
    """Scan, remat and vmap over blocks with dropout and statistics."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        axes = dict(variable_axes={'params': 0, 'batch_stats': 0}, split_rngs={'params': True})
        axes['split_rngs']['dropout'] = True
        scan = nn.scan(nn.remat(Step, static_argnums=(2,)), length=3, in_axes=nn.broadcast, **axes)
        x, _ = scan()(x, train)
        many = nn.vmap(Step, in_axes=(0, None), axis_size=3, **axes)()
        return many(jnp.stack([x] * 3), train)[0].sum(0)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not train)(x), None


@pytest.mark.slow
def test_lifted_transformations() -> None:
    model = bind(Lifted())
    kernels = [x.shape for x in jax.tree.leaves(model.params) if x.ndim == 3]
    assert kernels == [(3, 4, 4), (3, 4, 4)]
    before = model.collections
    first, second = model(X), model(X)
    assert not same(first, second)
    changed = jax.tree.map(same, before, model.collections)
    assert not any(jax.tree.leaves(changed))
    fixed = bind(Lifted(), 'eval')
    assert same(fixed(X), fixed(X))


class Sown(nn.Module):
    collection: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        self.sow(self.collection, 'seen', x)
        return self.perturb('nudge', x)


def test_sown_values_are_not_in_the_state() -> None:
    assert set(init(Sown('intermediates'))) == {'params'}
    assert same(bind(Sown('intermediates'))(X), X)
    with pytest.raises(ValueError, match="structure of the collection 'mine'"):
        bind(Sown('mine'))(X)


def test_init_covers_submodules_of_later_calls() -> None:
    variables = init(Normed(), lambda model, batch: (model.encode(X), model.norm(X, True)))
    assert set(variables['params']) == {'dense', 'norm'}
    assert set(variables['batch_stats']) == {'norm'}


def test_collections_are_returned_as_copies() -> None:
    model = bind(Normed())
    read = model.collections
    read.pop('batch_stats')
    assert set(model.collections) == {'batch_stats'}
