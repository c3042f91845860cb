# SPDX-License-Identifier: Apache-2.0
"""Linen modules behind the functional interface: modes, streams, boxes and lifted modules."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import errors

from tests.modules.examples import Normed, X, bind, everything, init, same
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys


def test_a_module_left_in_train_mode_fails_at_evaluation() -> None:
    """With Flax's own errors: immutable statistics, dropout without a key."""
    with pytest.raises(errors.ModifyScopeVariableError):
        bind(Normed(fixed=False), 'eval', task=everything)(X)
    with pytest.raises(errors.InvalidRngError, match='dropout'):
        bind(Normed(), 'eval', task=everything).drop(X, deterministic=False)


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
