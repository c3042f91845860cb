# SPDX-License-Identifier: Apache-2.0
"""Linen modules behind the functional interface: modes, keys, collections, methods and views."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

from trainer.modules import functional
from trainer.modules.linen import BoundModel
from trainer.step.rng import Keys

X = jnp.arange(12.0).reshape(3, 4)


def init(module: nn.Module, task: Any = None) -> Any:
    task = task or (lambda model, batch: model(batch['x']))
    return functional(module).init(task, {'x': X}, Keys(seed=0, mode='init'))


def bind(module: nn.Module, mode: str = 'train', *, task: Any = None, **options: Any) -> BoundModel:
    keys = Keys(seed=0, mode=mode, step=3)
    return functional(module).bind(init(module, task), keys, **options)


def same(a: Any, b: Any) -> bool:
    return bool(jnp.array_equal(a, b))


# Modules that return whether they train, by each spelling of the flag.
class InCall(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return train


class KeywordOnly(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, is_training: bool) -> Any:
        return is_training


class Inverted(nn.Module):
    @nn.compact
    def __call__(self, x: Any, deterministic: bool = True) -> Any:
        return not deterministic


class InConstructor(nn.Module):
    training: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return self.training


class InConstructorInverted(nn.Module):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return not self.deterministic


class InBoth(nn.Module):
    train: bool | None = None

    @nn.compact
    def __call__(self, x: Any, train: bool | None = None) -> Any:
        return nn.merge_param('train', self.train, train)


class Neither(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x


SPELLINGS = [InCall, KeywordOnly, Inverted, InConstructor, InConstructorInverted, InBoth]


@pytest.mark.parametrize('module', SPELLINGS)
def test_the_mode_is_told_in_every_spelling(module: type[nn.Module]) -> None:
    assert bind(module(), 'train')(X) is True
    assert bind(module(), 'eval')(X) is False


def test_what_the_user_sets_is_left_alone() -> None:
    assert bind(InConstructor(training=True), 'eval')(X) is True
    assert bind(InCall(), 'train')(X, train=False) is False
    assert same(bind(Neither(), 'train')(X), X)


class Normed(nn.Module):
    """Statistics, two random streams, and parts that can be called by themselves."""

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


def test_methods_and_sub_modules() -> None:
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
    """Whichever view is called, the next call of any of them sees what it has changed."""
    model = bind(Normed(), task=everything, ema=init(Normed(), everything)['params'])
    views = (model, model.ema, model.stop_gradient('.*'), model.ema.stop_gradient('dense.*'))
    batch = model.dense(X).mean(0)
    for calls, view in enumerate(views, start=1):
        view(X)
        expected = batch * (1 - 0.5**calls)
        for other in views:
            mean = other.collections['batch_stats']['norm']['mean']
            np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_calls_draw_numbers_of_their_own_through_every_view() -> None:
    model = bind(Normed(), task=everything, ema=init(Normed(), everything)['params'])
    views = (model, model, model.ema, model.stop_gradient('x'), model)
    masks = [np.asarray(view.drop(jnp.ones((8, 16)), deterministic=False)) for view in views]
    assert len({mask.tobytes() for mask in masks}) == len(views)
    again = bind(Normed(), task=everything)
    assert same(again.drop(jnp.ones((8, 16)), deterministic=False), masks[0])


def test_views_differ_in_their_parameters_alone() -> None:
    average = jax.tree.map(jnp.zeros_like, init(Normed(), everything)['params'])
    model = bind(Normed(), 'eval', task=everything, ema=average)
    assert same(model.ema.encode(X), jnp.zeros((3, 4)))
    assert not same(model.encode(X), jnp.zeros((3, 4)))
    assert same(model.stop_gradient('dense/kernel').encode(X), model.encode(X))
    with pytest.raises(ValueError, match=r'set config\.ema\.decay'):
        _ = bind(Normed(), task=everything).ema


def test_stop_gradient_is_by_whole_path() -> None:
    variables, keys = init(Normed(), everything), Keys(seed=0, mode='train')

    def loss(params: Any, pattern: str) -> Any:
        model = functional(Normed()).bind({**variables, 'params': params}, keys)
        return model.stop_gradient(pattern).encode(X).sum()

    grads = jax.grad(loss)(variables['params'], 'dense/kernel')
    assert not grads['dense']['kernel'].any()
    assert grads['dense']['bias'].all()
    assert jax.grad(loss)(variables['params'], 'dense')['dense']['kernel'].any()


def test_a_module_left_in_train_mode_fails_at_evaluation() -> None:
    """Flax's own errors: statistics that may not change, dropout without a key."""
    with pytest.raises(errors.ModifyScopeVariableError):
        bind(Normed(fixed=False), 'eval', task=everything)(X)
    with pytest.raises(errors.InvalidRngError, match='dropout'):
        bind(Normed(), 'eval', task=everything).drop(X, deterministic=False)


def test_keys_by_name() -> None:
    model, other = bind(Neither()), bind(Neither(), 'eval')
    assert model.rng('noise') != model.rng('other')
    assert model.rng('noise') == bind(Neither()).rng('noise')
    assert model.rng('noise') != other.rng('noise')


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


def test_what_is_sown_is_not_kept() -> None:
    assert set(init(Sown('intermediates'))) == {'params'}
    assert same(bind(Sown('intermediates'))(X), X)
    with pytest.raises(ValueError, match="structure of the collection 'mine'"):
        bind(Sown('mine'))(X)


def test_a_part_that_only_a_later_call_uses_has_variables() -> None:
    variables = init(Normed(), lambda model, batch: (model.encode(X), model.norm(X, True)))
    assert set(variables['params']) == {'dense', 'norm'}
    assert set(variables['batch_stats']) == {'norm'}
