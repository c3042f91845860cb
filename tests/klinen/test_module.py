# SPDX-License-Identifier: Apache-2.0
"""Klinen modules beyond the documentation: submodules of any kind, and other collections."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

from tests.klinen.test_document import MLP, RNG, RNG2, AutoEncoder, Noisy, Setup, X
from tests.modules.examples import same
from trainer import klinen as knn


def test_submodules_created_in_setup() -> None:
    """By name, in dicts and lists; also methods, fields and properties."""
    model = Setup().init_bind(RNG, X)
    hidden = model.encode(X)
    assert same(model.dense(X), hidden)
    assert isinstance(model.dense, nn.Dense)
    assert same(model.dense.params['kernel'], model.params['dense']['kernel'])
    a, b, c = model(X)
    assert same(model.heads['a'](hidden), a)
    assert same(model.heads['b'][0](hidden), b)
    assert same(model.heads['b'][1](hidden), c)
    assert (model.width, model.twice) == (3, 6)
    with pytest.raises(AttributeError, match='nothing_such'):
        _ = model.nothing_such
    with pytest.raises(ValueError, match=r"has no 'dense'.*init_bind"):
        Setup().encode(X)
    assert not hasattr(Setup(), 'dense')


class Root(knn.Module):
    """Has a parameter besides those of its submodules."""

    def setup(self) -> None:
        self.scale = self.param('scale', nn.initializers.ones, ())
        self.drop = knn.Dropout(0.5)
        self.mlp = nn.Dense(4)
        self.mode = 'train' if self.training else 'eval'

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.mlp(x)) * self.scale


def test_a_submodule_does_not_need_its_owner_s_parameters() -> None:
    model = Root().init_bind(RNG, X).with_rng(RNG)
    assert same(model.drop(model.mlp(X)) * model.scale, model(X))
    assert len(jax.tree.leaves(model.mlp.params)) == 2
    assert (model.mode, model.eval().mode) == ('train', 'eval')
    assert same(model.eval().drop(X), X)


class Tied(knn.Module):
    """Two submodules that share a table."""

    encoder: nn.Module
    decoder: nn.Module

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.decoder(self.encoder(ids))


class Embed(knn.Module):
    table: nn.Embed

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.table(ids)


class Attend(nn.Module):
    tables: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.tables['main'][0].attend(nn.Dense(4)(x))


def test_a_submodule_has_the_variables_that_it_shares() -> None:
    table = nn.Embed(10, 4)
    model = Tied(Embed(table), Attend({'main': [table]}))
    ids = jnp.arange(3)
    model = model.init_bind(RNG, ids)
    assert set(model.params) == {'encoder', 'decoder'}
    assert set(model.params['decoder']) == {'Dense_0'}
    assert same(model.decoder(model.encoder(ids)), model(ids))
    assert same(model.decoder.tables['main'][0](ids), model.encoder(ids))
    leaves = jax.tree.leaves(model.decoder)
    assert sum(leaf.size for leaf in leaves) == 4 * 4 + 4 + 10 * 4


def test_a_submodule_in_two_places_is_one_object() -> None:
    """Each access of a model returns the same object; a copy of the model has its own."""
    shared = MLP()
    model = knn.Sequential([MLP(), shared, shared]).init_bind(RNG, X)
    assert model.layers[1] is model.layers[2]
    assert model.layers[1] is not model.layers[0]
    assert model.layers[0] is model.layers[0]
    evaluated = model.eval()
    assert evaluated.layers[1] is evaluated.layers[2]
    assert evaluated.layers[1] is not model.layers[1]
    assert not evaluated.layers[1].training and model.layers[1].training
    again = pickle.loads(pickle.dumps(model))
    assert again.layers[1] is again.layers[2]
    assert same(again(X), model(X))
    doubled = jax.tree.map(lambda x: 2 * x, model)
    kernel = model.layers[1].params['Dense_0']['kernel']
    assert same(doubled.layers[1].params['Dense_0']['kernel'], 2 * kernel)


def test_sharing_is_part_of_the_structure() -> None:
    one, two = nn.Dropout(0.5), nn.Dropout(0.5)

    def structure(*layers: nn.Module) -> Any:
        return jax.tree.structure(knn.Sequential(layers).init_bind(RNG, X))

    assert structure(one, one) == structure(two, two)
    assert structure(one, one) != structure(one, two)
    assert structure(one, two) == structure(two, one)
    assert structure(nn.Dropout(0.5)) != structure(nn.Dropout(0.4))


class Unhashable(knn.Module):
    table: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(x) + self.table.sum()


def test_fields_that_cannot_be_hashed() -> None:
    table = np.ones(3)
    traces = []

    @jax.jit
    def call(model: Unhashable, x: jax.Array) -> jax.Array:
        traces.append(None)
        return model(x)

    model = Unhashable(table).init_bind(RNG, X)
    np.testing.assert_allclose(call(model, X), model(X), rtol=1e-6)
    call(Unhashable(table).init_bind(RNG, X), X)
    assert len(traces) == 1
    call(Unhashable(np.zeros(3)).init_bind(RNG, X), X)
    assert len(traces) == 2


class Normed(knn.Module):
    """Batch statistics and a custom collection."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        calls = self.variable('count', 'calls', lambda: jnp.zeros((), int))
        if self.training and not self.is_initializing():
            calls.value += 1
        x = nn.BatchNorm(use_running_average=not self.training, momentum=0.5)(x)
        return knn.Dropout(0.5)(x)


def test_other_collections() -> None:
    """A call changes nothing; `call_with_updates` returns the updated model."""
    model = AutoEncoder(Normed(), MLP()).init_bind(RNG, X).with_rng(RNG)
    assert set(model.variables) == {'params', 'batch_stats', 'count'}
    y, updated = model.call_with_updates(X)
    mean = updated.variables['batch_stats']['encoder']['BatchNorm_0']['mean']
    np.testing.assert_allclose(mean, 0.5 * X.mean(0), rtol=1e-5, atol=1e-6)
    assert not model.variables['batch_stats']['encoder']['BatchNorm_0']['mean'].any()
    assert updated.encoder.variables['count'] == {'calls': 1}
    assert same(updated.call_with_updates(X)[0], y)  # Training does not read the averages.
    _, part = updated.encoder.call_with_updates(X)
    assert part.variables['count'] == {'calls': 2}
    assert not same(updated.eval()(X), model.eval()(X))
    again = model.with_variables(updated.variables).eval()
    assert same(again(X), updated.eval()(X))


def test_a_call_that_would_lose_an_update_raises() -> None:
    model = AutoEncoder(Normed(), MLP()).init_bind(RNG, X).with_rng(RNG)
    with pytest.raises(errors.ModifyScopeVariableError) as caught:
        model(X)
    assert 'call_with_updates' in ''.join(caught.value.__notes__)
    with pytest.raises(errors.ModifyScopeVariableError):
        model.call_with_intermediates(X)


def test_updates_under_jit_and_grad() -> None:
    """Only parameters have gradients, so an update of all leaves changes only these."""
    model = AutoEncoder(Normed(), MLP()).init_bind(RNG, X)

    def train_loss(model: Any, x: jax.Array) -> Any:
        y, updated = model.with_rng(RNG).call_with_updates(x)
        return jnp.mean(y**2), updated.variables['batch_stats']

    floats = model.with_variables({k: v for k, v in model.variables.items() if k != 'count'})
    grads, stats = jax.jit(jax.grad(train_loss, has_aux=True, allow_int=True))(model, X)
    assert stats['encoder']['BatchNorm_0']['mean'].any()
    assert any(leaf.any() for leaf in jax.tree.leaves(grads.params))
    fixed = AutoEncoder(knn.BatchNorm(), MLP()).init_bind(RNG, X).eval()
    grads = jax.grad(lambda model: jnp.mean(model(X) ** 2))(fixed)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads.variables['batch_stats']))
    assert any(leaf.any() for leaf in jax.tree.leaves(grads.params))
    assert set(floats.variables) == {'params', 'batch_stats'}


class Nudged(knn.Module):
    """Statistics, a custom collection, and a perturbed value."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fast = self.variable('fast', 'weights', jnp.ones, x.shape[-1:])
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x * fast.value))
        return (self.perturb('hidden', x) ** 2).sum()


def test_collections_with_gradients() -> None:
    """Perturbations as in Linen; none of statistics and others."""
    variables = Nudged().init(RNG, X)
    model = knn.bind(Nudged(), variables)
    grads = jax.grad(lambda model: model(X))(model).variables
    theirs = jax.grad(lambda variables: Nudged().apply(variables, X))(variables)
    for name in ('params', 'perturbations'):
        assert all(leaf.any() for leaf in jax.tree.leaves(theirs[name]))
        jax.tree.map(np.testing.assert_array_equal, grads[name], theirs[name])
    for name in ('batch_stats', 'fast'):
        assert not any(leaf.any() for leaf in jax.tree.leaves(grads[name]))
        assert any(leaf.any() for leaf in jax.tree.leaves(theirs[name]))


def test_parameters_passed_as_variables() -> None:
    """The message says what is missing."""
    for model in (MLP(), AutoEncoder(MLP(), MLP())):
        params = model.init_bind(RNG, X).params
        with pytest.raises(ValueError, match=r"without parameters .*with_variables\(\{'params': p"):
            model.with_variables(params)(X)


class Sown(knn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow('mine', 'seen', x)
        self.sow('intermediates', 'seen', x)
        return self.perturb('nudge', x)


def test_accumulating_values_are_an_error() -> None:
    """Growing tuples would change the structure in each call."""
    model = Sown().init_bind(RNG, X)
    assert set(model.variables) == {'params', 'mine'}
    with pytest.raises(ValueError, match=r"collection 'mine'.*knn\.Intermediate"):
        model.call_with_updates(X)
    assert dir(model.call_with_intermediates(X)[1]) == []


def test_methods_with_updates_and_intermediates() -> None:
    """Of methods other than `__call__`, and both in one call."""

    class Model(knn.Module):
        seen: knn.Intermediate[jax.Array] = dataclasses.field(init=False)

        def setup(self) -> None:
            self.norm = knn.BatchNorm(momentum=0.5)

        def encode(self, x: jax.Array) -> jax.Array:
            self.seen = x.sum()
            return self.norm(x)

    model = Model().init_bind(RNG, X, method='encode')
    with model.capture_intermediates() as kept:
        _, updated = model.call_with_updates(X, method='encode')
    assert same(kept.seen, X.sum())
    assert not same(updated.eval().encode(X), model.eval().encode(X))
    y, kept = updated.eval().call_with_intermediates(X, method='encode')
    assert same(y, updated.eval().encode(X))
    assert same(kept.seen, X.sum())


def test_lifted_and_plain_classes_are_bound() -> None:
    """`nn.jit` of a Klinen class, a Linen module with its variables, boxed parameters."""
    model = nn.jit(Noisy)().init_bind(RNG, X).with_rng(RNG)
    assert not same(model(X), model.eval()(X))
    assert same(model(X), model.train()(X))
    linen = nn.Sequential([nn.Dense(4), nn.Dropout(0.5)])
    bound = knn.bind(linen, knn.Sequential(linen.layers).init(RNG, X)).with_rng(RNG)
    assert not same(bound(X), bound.eval()(X))
    assert same(bound.layers[1](bound.layers[0](X)), bound(X))
    boxed = knn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, 'model')))
    partitioned = boxed.init_bind(RNG, X)
    assert isinstance(partitioned.params['kernel'], nn.Partitioned)
    np.testing.assert_allclose(partitioned(X)[:, 0], X.sum(1), atol=1e-5)


class Bridged(knn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.bridge.ToLinen(nnx.Dropout, args=(0.5,))(nn.Dense(8)(x))


def test_nnx_submodules() -> None:
    """They follow the training flag and draw from the model's key."""
    model = Bridged().init_bind(RNG, X).with_rng(RNG)
    y, _ = model.call_with_updates(X)
    assert not same(y, model.with_rng(RNG2).call_with_updates(X)[0])
    assert same(model.eval()(X), model.eval().with_rng(RNG2)(X))
    assert not same(model.eval()(X), y)


def test_a_bound_module_cannot_be_a_field() -> None:
    """Its parameters would be lost silently."""
    model = AutoEncoder(MLP(), MLP()).init_bind(RNG, X)
    with pytest.raises(ValueError, match=r'AutoEncoder\.decoder is bound.*part\.clone\(\)'):
        AutoEncoder(MLP(), model.decoder)
    with pytest.raises(ValueError, match=r'Sequential\.layers is bound'):
        knn.Sequential([model.encoder])
    new = AutoEncoder(model.decoder.clone(), model.encoder.clone())
    swapped = {'encoder': model.decoder.params, 'decoder': model.encoder.params}
    assert same(new.with_variables({'params': swapped})(X), model.encoder(model.decoder(X)))
