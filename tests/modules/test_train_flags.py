# SPDX-License-Identifier: Apache-2.0
"""Modules get their training flag, whatever its name and wherever they are in the model."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules.examples import X, bind, same


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
    assert bind(InBoth(train=True), 'eval')(X) is True


def test_a_flag_may_be_given_by_position() -> None:
    assert bind(InCall(), 'eval')(X, True) is True
    with pytest.raises(TypeError, match='takes from 2 to 3 positional arguments but 4 were given'):
        bind(InCall())(X, True, 3)


class Around(nn.Module):
    """Has other modules as fields and tells them nothing."""

    alone: nn.Module
    listed: Any
    named: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        parts = (self.alone, *self.listed, *self.named.values())
        return [part(x) for part in parts]


def test_modules_that_are_fields_of_others_are_told() -> None:
    once, told = InConstructor(), InConstructor(training=True)
    module = Around(once, (InConstructorInverted(), told), {'b': once, 'a': Around(once, [], {})})
    assert bind(module, 'train')(X) == [True, True, True, True, [True]]
    assert bind(module, 'eval')(X) == [False, False, True, False, [False]]
    assert once.training is False


class Shared(nn.Module):
    """Parameters, and a flag that only the constructor takes."""

    training: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(4)(x)


def test_a_module_in_two_fields_stays_one() -> None:
    dense = Shared()
    first, *others = bind(Around(dense, (dense,), {'a': dense}), 'train')(X)
    assert all(same(first, other) for other in others)


def test_the_layers_of_a_sequential_model_are_told() -> None:
    inner = nn.Sequential([nn.BatchNorm(momentum=0.5), nn.Dropout(0.5)])
    module = nn.Sequential([nn.Dense(64), inner, nn.relu, nn.Dropout(0.5, deterministic=True)])
    model = bind(module)
    assert not same(model(X), model(X))
    mean = model.collections['batch_stats']['layers_1']['layers_0']['mean']
    np.testing.assert_allclose(mean, 0.75 * model.layers[0](X).mean(0), rtol=1e-5)
    fixed = bind(module, 'eval')
    assert same(fixed(X), fixed(X))
    assert bind(nn.Sequential([InCall()]))(X) is True
    assert bind(nn.Sequential([InCall()]))(X, train=False) is False


class Frozen(nn.Module):
    """Keeps the mode from a part of its own."""

    def setup(self) -> None:
        self.part = nn.Sequential([InCall()])

    def __call__(self, x: Any) -> Any:
        return self.part(x)


def test_a_module_passes_the_mode_on_by_itself() -> None:
    assert bind(Frozen())(X) is False
    assert bind(nn.Sequential([Frozen()]))(X) is False


class Tells(nn.Module):
    """Tells a part, one of its fields, in the call."""

    part: nn.Module

    def __call__(self, x: Any, train: bool) -> Any:
        return self.part(x, deterministic=not train)


def test_a_flag_that_a_call_takes_is_left_to_the_caller() -> None:
    """Flax refuses a flag that stands in both the constructor and the call."""
    assert set(bind(Tells(nn.Dropout(0.5)))(jnp.ones(99)).tolist()) == {0.0, 2.0}


class Static(nn.Module):
    """Branches on its flag, which must therefore reach it as a Python bool."""

    @nn.compact
    def __call__(self, x: Any, scale: float = 1.0, train: bool = False) -> Any:
        return nn.Dropout(0.5, deterministic=False)(x * scale) if train else x


@pytest.mark.parametrize(
    'module',
    [
        nn.remat(Static, static_argnums=(3,)),
        nn.jit(Static, static_argnums=(3,)),
        nn.vmap(Static, in_axes=(0, None, None), split_rngs={'params': True, 'dropout': True}),
    ],
)
def test_lifted_models_are_told_by_position(module: type[nn.Module]) -> None:
    x = jnp.ones((8, 16))
    task = lambda model, batch: model(x)  # noqa: E731
    assert set(bind(module(), task=task)(x).flatten().tolist()) == {0.0, 2.0}
    assert same(bind(module(), 'eval', task=task)(x), x)
