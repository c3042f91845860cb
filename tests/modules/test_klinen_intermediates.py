# SPDX-License-Identifier: Apache-2.0
"""What calls of Klinen modules keep, in the structure of the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.modules.examples import same
from tests.modules.test_klinen import MLP, RNG, AutoEncoder, X
from trainer.modules import klinen as knn


class Sequential(knn.Module):
    """The document's `Sequential`, with its `childs` qualified."""

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
    """K11, K12: the document's example; each call starts anew, and nothing stays on the model."""
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
    assert model.encoder.tmp_values == []
    with pytest.raises(AttributeError, match='there are: tmp_values, childs'):
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


def test_captures_do_not_nest_and_are_of_one_model() -> None:
    """K12."""
    model, other = intermediate_model(), intermediate_model()
    with pytest.raises(RuntimeError, match='do not nest'):  # noqa: SIM117
        with model.capture_intermediates(), other.capture_intermediates():
            pass
    with model.capture_intermediates() as found:
        other(X)
    with pytest.raises(AttributeError, match='no call has been captured'):
        _ = found.encoder
    with model.capture_intermediates() as found:
        part = model.eval().encoder(X)
    assert same(found.encoder.tmp_values[1], part)


def test_intermediates_leave_a_compiled_function() -> None:
    """K12."""
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


def test_lifted_modules() -> None:
    """K11: a field may be assigned, and comes out of scanned and checkpointed modules."""
    model = Lifted().init_bind(RNG, X).with_rng(RNG)
    assert {'MLP_0', 'Dense_0'} < set(model.params)  # As Linen names what is made in the call.
    y, found = model.call_with_intermediates(X)
    assert same(y, model(X))
    assert found.last.kept.shape == ()
    assert len(found.list.tmp_values) == 2
    layers = [name for name in dir(found) if name.startswith('Scan')]
    assert getattr(found, layers[0]).kept.shape == (3,)
    grads = jax.grad(lambda params: model.with_params(params)(X).sum())(model.params)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))


class Twice(knn.Module):
    """Calls one part twice, and keeps values of several kinds."""

    note: knn.Intermediate[dict[str, Any]] = dataclasses.field(init=False, default_factory=dict)
    unset: knn.Intermediate[Any] = dataclasses.field(init=False)

    def setup(self) -> None:
        self.layer = Layer()

    def __call__(self, x: jax.Array) -> jax.Array:
        x, _ = self.layer(x, None)
        x, _ = self.layer(x, None)
        self.note['shape'] = x.shape
        return x


def test_a_part_that_is_called_twice() -> None:
    """K11: the last call's value counts; a field that was not assigned is not there."""
    model = Twice().init_bind(RNG, X).eval()
    y, found = model.call_with_intermediates(X)
    np.testing.assert_allclose(found.layer.kept, y.sum(), rtol=1e-6)
    assert found.note == {'shape': (2, 64)}
    assert not hasattr(found, 'unset')
