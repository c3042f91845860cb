# SPDX-License-Identifier: Apache-2.0
"""The training flag reaches every submodule of a Klinen model, of Klinen and of Linen."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

from tests.klinen.test_document import MLP, RNG, AutoEncoder, Noisy, X
from tests.modules.examples import same
from trainer import klinen as knn
from trainer.klinen.notebook import bind_for_notebook
from trainer.modules.functional import as_functional


def test_modes() -> None:
    """Training by default; `eval` and `train` return copies."""
    model = AutoEncoder(Noisy(), Noisy()).init_bind(RNG, X)
    assert model.training
    fixed = model.eval()
    assert not fixed.training
    assert model.training
    assert not fixed.encoder.training
    assert fixed.train().training
    assert fixed.encoder.train().training
    assert same(fixed(X), fixed.decoder(fixed.encoder(X)))
    assert not same(fixed.train().with_rng(RNG)(X), fixed(X))
    for frozen in (model, MLP()):
        with pytest.raises(errors.SetAttributeFrozenModuleError):
            frozen.training = False
    with pytest.raises(errors.SetAttributeFrozenModuleError):
        model.width = 3


def test_a_flag_set_before_binding() -> None:
    """A submodule constructed with `eval()` stays in evaluation mode."""
    assert not MLP().eval().training
    assert not MLP().eval().init_bind(RNG, X).training
    model = MLP(training=False).init_bind(RNG, X)
    assert (model.training, model.train().training) == (False, True)
    fixed = Noisy(training=False).init_bind(RNG, X).with_rng(RNG)
    assert not same(fixed.train()(X), fixed(X))
    part = AutoEncoder(Noisy().eval(), Noisy()).init_bind(RNG, X).with_rng(RNG)
    assert not part.encoder.training
    assert same(part.encoder(X), part.eval().encoder(X))
    assert not same(part.decoder(X), part.eval().decoder(X))


@pytest.mark.slow
def test_layers_follow_the_flag() -> None:
    """Klinen's layers need no argument, wherever they are."""
    x = jnp.ones((64, 16))
    dropped = knn.Dropout(0.5).init_bind(RNG, x).with_rng(RNG)
    assert set(np.unique(dropped(x))) == {0.0, 2.0}
    assert same(dropped.eval()(x), x)
    norm = knn.BatchNorm(momentum=0.5).init_bind(RNG, x)
    np.testing.assert_allclose(norm.eval()(x), x / jnp.sqrt(1 + 1e-5), rtol=1e-6)
    assert not norm.call_with_updates(x)[0].any()

    def layers() -> knn.Sequential:
        return knn.Sequential([nn.Dense(4), nn.Dropout(0.5), nn.BatchNorm(), knn.Dropout(0.5)])

    for model in (layers(), AutoEncoder(layers(), knn.Sequential([layers()]))):
        bound = model.init_bind(RNG, x).with_rng(RNG)
        y, bound = bound.call_with_updates(x)
        assert not same(y, bound.with_rng().call_with_updates(x)[0])
        assert same(bound.eval()(x), bound.eval().with_rng()(x))
    assert same(dropped(x, deterministic=True), x)


class Flagged(nn.Module):
    """A Linen module with a training flag in its call."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dropout(0.5, deterministic=not train)(x)


def test_converted_modules_get_the_flag() -> None:
    model = AutoEncoder(knn.convert(Flagged)(), MLP()).init_bind(RNG, X).with_rng(RNG)
    assert not same(model.encoder(X), X)
    assert same(model.decoder(model.encoder(X)), model(X))
    assert same(model.eval().encoder(X), X)


class Guide(nn.Module):
    """A Linen class with members that have names of Klinen's interface."""

    train: bool = True
    eval: bool = True
    params: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.params)(x) if self.eval else x
        return nn.Dropout(0.5, deterministic=not self.train)(x)

    def with_rng(self, x: jax.Array) -> jax.Array:
        return x


def test_linen_classes_with_names_of_the_interface() -> None:
    """On a bound model the interface wins; the module's own code sees its members."""
    variables = Guide(train=False).init(RNG, X)
    fixed = bind_for_notebook(as_functional(Guide()), variables)
    for model in (fixed, knn.bind(Guide(), variables), knn.convert(Guide)().init_bind(RNG, X)):
        assert set(model.params) == {'Dense_0'}
        noisy = model.train().with_rng(RNG)
        assert (noisy.training, noisy.eval().training) == (True, False)
        assert model.eval()(X).shape == (2, 2)
        assert same(noisy.eval()(X), model.eval()(X))
        assert not same(noisy(X), noisy.eval()(X))


def test_names_that_would_override_the_interface() -> None:
    """Fields and methods of a Klinen class."""

    def make_class(**names: Any) -> type:
        return type('Wrong', (knn.Module,), names)

    with pytest.raises(TypeError, match=r'Wrong\.train would override .* rename it'):
        make_class(train=True, __annotations__={'train': bool})
    with pytest.raises(TypeError, match=r'Wrong\.params would override'):
        make_class(__annotations__={'params': int})
    with pytest.raises(TypeError, match=r'Wrong\.eval would override'):
        make_class(eval=lambda self, x: x)


class ReturnFlag(knn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> bool:
        return self.training


class Wrap(nn.Module):
    """Linen between Klinen modules."""

    part: nn.Module | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        return (self.part or ReturnFlag())(x)


class WithDefault(knn.Module):
    """Its submodule was created with the class, outside of any model."""

    part: knn.Module = ReturnFlag()

    def __call__(self, x: jax.Array) -> Any:
        return self.part(x)


class InField(nn.Module):
    """A Linen module with a training flag in its constructor."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> bool:
        return not self.deterministic


class Around(knn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        return [
            self.training,
            ReturnFlag()(x),
            WithDefault()(x),
            Wrap()(x),
            Wrap(ReturnFlag())(x),
            nn.jit(ReturnFlag)()(x),
            nn.jit(Wrap)()(x),
            nn.remat(ReturnFlag)()(x),
            nn.remat(Wrap)()(x),
            nn.remat(Wrap)(ReturnFlag())(x),
        ]


def test_the_flag_reaches_every_submodule() -> None:
    """Within Linen modules and lifted ones."""
    model = Around().init_bind(RNG, X)
    assert model(X) == [True] * 10
    assert model.eval()(X) == [False] * 10
    assert model(X) == [True] * 10
    part = AutoEncoder(MLP(), InField()).init_bind(RNG, X).eval().decoder
    assert [part(X), part.train()(X), part.train().eval()(X)] == [False, True, False]
    inside = AutoEncoder(Wrap(Around().eval()), ReturnFlag()).init_bind(RNG, X)
    assert inside.encoder(X)[:4] == [False] * 4


def test_klinen_submodules_of_a_linen_model() -> None:
    """In plain Linen calls they are in training mode unless the flag says otherwise."""

    class Model(nn.Module):
        part: knn.Module

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return self.part(x)

    model = Model(Noisy())
    variables = model.init(RNG, X)
    assert not same(model.apply(variables, X, rngs={'dropout': RNG}), X)
    with pytest.raises(errors.InvalidRngError):
        model.apply(variables, X)
    assert model.copy(part=Noisy().eval()).apply(variables, X).shape == X.shape
