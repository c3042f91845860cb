# SPDX-License-Identifier: Apache-2.0
"""Intermediate values of Klinen modules, in the structure of the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.klinen.test_document import MLP, RNG, AutoEncoder, X
from tests.modules.examples import bind, init, same
from trainer import klinen as knn
from trainer.modules.ensemble import EnsembleModel
from trainer.modules.ensemble_outputs import mean
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys


class Sequential(knn.Module):
    """The documentation's `Sequential`, with its `childs` annotated."""

    childs: list[nn.Module]
    tmp_values: knn.Intermediate[list[jax.Array]] = dataclasses.field(
        init=False, default_factory=list
    )

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for child in self.childs:
            x = child(x)
            self.tmp_values.append(x)
        return x


def intermediate_model() -> AutoEncoder:
    return AutoEncoder(encoder=Sequential([nn.Dense(32), nn.Dense(32)]), decoder=MLP()).init_bind(
        RNG, X
    )


def test_intermediates_of_a_call() -> None:
    """The documentation's example; no value is kept from one call to the next."""
    model = intermediate_model()
    plain = model(X)
    with model.capture_intermediates() as intermediates:
        y = model(X)
        model(X)
    assert same(y, plain)
    tmp_values = intermediates.encoder.tmp_values
    assert len(tmp_values) == 2
    assert same(tmp_values[1], model.encoder(X))
    assert same(tmp_values[0], model.encoder.childs[0](X))
    with pytest.raises(AttributeError, match=r'Sequential\.tmp_values .* inside module functions'):
        _ = model.encoder.tmp_values
    with pytest.raises(AttributeError, match='available: tmp_values, childs'):
        _ = intermediates.encoder.kernel
    assert dir(intermediates) == ['decoder', 'encoder']
    nested = Sequential([nn.Dense(3), Sequential([nn.Dense(2)])]).init_bind(RNG, X)
    y, found = nested.call_with_intermediates(X)
    assert dir(found) == ['childs', 'tmp_values']
    assert same(found.childs[1].tmp_values[0], y)
    for call in (model.call_with_intermediates, model.call_with_intermediate):
        y, found = call(X)
        assert same(y, plain)
        assert same(found.encoder.tmp_values[0], tmp_values[0])


class Unset(knn.Module):
    """Reads a field, optionally before the call has assigned it."""

    value: knn.Intermediate[jax.Array] = dataclasses.field(init=False)

    @nn.compact
    def __call__(self, x: jax.Array, early: bool = False) -> jax.Array:
        if early:
            return self.value
        self.value = nn.Dense(2)(x)
        return self.value


def test_reading_an_unset_field_is_an_error() -> None:
    """A field can only be read within a call, after it was assigned in the same call."""
    model = Unset().init_bind(RNG, X)
    assert same(model(X), model.call_with_intermediates(X)[1].value)
    with pytest.raises(AttributeError, match=r'Unset\.value .* not set during the call'):
        model(X, early=True)
    for outside in (model, Unset()):
        with pytest.raises(AttributeError, match=r'Unset\.value .* inside module functions'):
            _ = outside.value
    assert not hasattr(model, 'value')


def test_captures_are_not_nested_and_belong_to_one_model() -> None:
    """A second capture is an error, and calls of another model are not captured."""
    model, other = intermediate_model(), intermediate_model()
    with pytest.raises(RuntimeError, match='do not nest'):  # noqa: SIM117
        with model.capture_intermediates(), other.capture_intermediates():
            pass
    with model.capture_intermediates() as found:
        other(X)
    with pytest.raises(AttributeError, match='no call was captured'):
        _ = found.encoder
    with model.capture_intermediates() as found:
        part = model.eval().encoder(X)
    assert same(found.encoder.tmp_values[1], part)


def test_captures_of_submodules() -> None:
    """In the structure of the captured model, also if a submodule or its owner is called."""
    model = AutoEncoder(
        MLP(), Sequential([Sequential([nn.Dense(3)]), Sequential([nn.Dense(2)])])
    ).init_bind(RNG, X)
    hidden = model.encoder(X)
    last = model.decoder(hidden)

    first, found = model.decoder.childs[0].call_with_intermediates(hidden)
    assert dir(found) == ['childs', 'tmp_values']
    assert same(found.tmp_values[0], first)
    y, found = model.decoder.call_with_intermediates(hidden)
    assert same(found.childs[1].tmp_values[0], y)

    with model.capture_intermediates() as found:
        model.decoder.childs[1](first)
    assert dir(found) == ['decoder', 'encoder']
    assert dir(found.decoder) == ['childs'] and len(found.decoder.childs) == 2
    assert same(found.decoder.childs[1].tmp_values[0], last)
    assert not hasattr(found.decoder.childs[0], 'tmp_values')

    with model.decoder.childs[1].capture_intermediates() as found:
        model(X)
        model.decoder.childs[0](hidden)  # Not of this part: it stays with the call before.
    assert same(found.tmp_values[0], last)


class Shared(knn.Module):
    """Two submodules that share a third one."""

    one: nn.Module
    two: nn.Module

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.two(self.one(x))


def test_captures_of_shared_submodules() -> None:
    """The values are in every place where the model has the module."""
    part = Sequential([nn.Dense(64)])
    model = Shared(Sequential([part]), Sequential([part])).init_bind(RNG, X)
    y, found = model.call_with_intermediates(X)
    assert same(found.two.childs[0].tmp_values[1], y)
    assert same(found.one.childs[0].tmp_values[1], y)
    with model.capture_intermediates() as found:
        z = model.two.childs[0](X)
    assert same(found.two.childs[0].tmp_values[0], z)
    y, found = model.two.childs[0].call_with_intermediates(X)
    assert same(found.tmp_values[0], z)


def test_compiled_functions_return_intermediates() -> None:
    """The values equal those of a direct call."""
    model = intermediate_model()
    _, found = jax.jit(lambda model, x: model.call_with_intermediates(x))(model, X)
    np.testing.assert_allclose(found.encoder.tmp_values[1], model.encoder(X), rtol=1e-5, atol=1e-6)


class Lifted(knn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = {'params': 0, 'intermediates': 0}
        scan = nn.scan(Layer, axes, split_rngs={'params': True, 'dropout': True}, length=3)
        x, _ = scan()(x, None)
        x, _ = nn.remat(Layer, static_argnums=())(name='last')(x, None)
        x = nn.remat(Sequential)([nn.Dense(64), Sequential([nn.Dense(64)])], name='list')(x)
        return nn.remat(AutoEncoder)(MLP(), knn.Dense(2), name='two')(x)


class Layer(knn.Module):
    kept: knn.Intermediate[jax.Array] = dataclasses.field(init=False)

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        x = knn.Dropout(0.1)(nn.Dense(64)(x))
        self.kept = x.sum()
        return x, None


@pytest.mark.slow
def test_lifted_modules() -> None:
    """Fields assigned within scanned and checkpointed modules are returned."""
    model = Lifted().init_bind(RNG, X).with_rng(RNG)
    assert {'MLP_0', 'Dense_0'} < set(model.params)  # Linen's automatic names.
    y, found = model.call_with_intermediates(X)
    assert same(y, model(X))
    assert found.last.kept.shape == ()
    assert len(found.list.tmp_values) == 2
    layers = [name for name in dir(found) if name.startswith('Scan')]
    assert getattr(found, layers[0]).kept.shape == (3,)
    grads = jax.grad(lambda params: model.with_params(params)(X).sum())(model.params)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))


class Twice(knn.Module):
    """Calls one submodule twice, and stores values of several kinds."""

    note: knn.Intermediate[dict[str, Any]] = dataclasses.field(init=False, default_factory=dict)
    unset: knn.Intermediate[Any] = dataclasses.field(init=False)

    def setup(self) -> None:
        self.layer = Layer()

    def __call__(self, x: jax.Array) -> jax.Array:
        x, _ = self.layer(x, None)
        x, _ = self.layer(x, None)
        self.note['shape'] = x.shape
        return x


def test_a_submodule_that_is_called_twice() -> None:
    """The value of the last call counts; an unassigned field is missing."""
    model = Twice().init_bind(RNG, X).eval()
    y, found = model.call_with_intermediates(X)
    np.testing.assert_allclose(found.layer.kept, y.sum(), rtol=1e-6)
    assert found.note == {'shape': (2, 64)}
    assert not hasattr(found, 'unset')


class AnyValues(knn.Module):
    """Stores values that are not JAX types, and arrays that have no mean."""

    note: knn.Intermediate[dict[str, Any]] = dataclasses.field(init=False)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(3)(x)
        best, key = x.argmax(-1), jax.random.key(0)
        self.note = {'name': 'h', 'of': [{'a', 'b'}, x, None], 'best': best, 'key': key}
        return x


class Around(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.remat(AnyValues)(name='inner')(x)


def test_values_of_any_kind() -> None:
    """They pass through transformations, whether or not the call is captured."""
    for module in (AnyValues(), nn.remat(AnyValues)()):
        y, found = module.init_bind(RNG, X).call_with_intermediates(X)
        assert found.note['name'] == 'h' and found.note['of'][0] == {'a', 'b'}
        assert same(found.note['of'][1], y) and found.note['of'][2] is None
    model = bind(Around())
    y = jax.jit(jax.checkpoint(model))(jnp.ones((3, 4)))
    kept = bind(Around())
    assert same(kept(jnp.ones((3, 4))), y)
    assert kept.intermediates['inner']['note']['name'] == 'h'


def test_values_of_any_kind_in_an_ensemble() -> None:
    """Floats are averaged; other arrays are stacked over the members, other values unchanged."""
    both = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), init(AnyValues()))
    x = jnp.ones((3, 4))
    model = EnsembleModel(
        as_functional(AnyValues()), both, Keys(seed=0, mode='eval'), jnp.arange(2), combine=mean
    )
    y = jax.jit(model)(x)
    model(x)
    note = model.intermediates['note']
    np.testing.assert_allclose(note['of'][1], y, rtol=1e-6)
    assert note['name'] == 'h' and note['of'][0] == {'a', 'b'}
    assert (note['best'].shape, note['key'].shape) == ((2, 3), (2,))


class OneBranch(knn.Module):
    """Stores a value in one of two branches."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        part = Sequential([nn.Dense(64)], name='part')
        if self.is_initializing():
            part(x)
        return nn.cond(x.sum() > 0, lambda part, x: part(x), lambda part, x: x, part, x)


def test_branches_that_store_different_values() -> None:
    """Such a call runs without capture, with a warning."""
    model = OneBranch().init_bind(RNG, X)
    with pytest.warns(UserWarning, match='OneBranch: the branches of nn.cond .* is not captured'):
        y, found = model.call_with_intermediates(X)
    assert same(y, model(X))
    assert dir(found) == []


def test_an_intermediate_cannot_be_an_argument() -> None:
    """Without `init=False` it would be an argument of the constructor."""
    for field in (dataclasses.field(default_factory=list), dataclasses.MISSING):
        namespace: dict[str, Any] = {'__annotations__': {'tmp': knn.Intermediate[list]}}
        if field is not dataclasses.MISSING:
            namespace['tmp'] = field
        with pytest.raises(TypeError, match=r'Wrong\.tmp is a knn\.Intermediate.*init=False'):
            type('Wrong', (knn.Module,), namespace)
