# SPDX-License-Identifier: Apache-2.0
"""Modules get the training flag, whatever its name and their place in the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules.examples import X, bind, same
from trainer.modules.train_flags import set_fields


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
def test_every_flag_name_is_passed(module: type[nn.Module]) -> None:
    assert bind(module(), 'train')(X) is True
    assert bind(module(), 'eval')(X) is False


def test_flags_set_by_the_user_are_kept() -> None:
    assert bind(InConstructor(training=True), 'eval')(X) is True
    assert bind(InCall(), 'train')(X, train=False) is False
    assert same(bind(Neither(), 'train')(X), X)
    assert bind(InBoth(train=True), 'eval')(X) is True


def test_a_flag_may_be_passed_by_position() -> None:
    assert bind(InCall(), 'eval')(X, True) is True
    with pytest.raises(TypeError, match='takes from 2 to 3 positional arguments but 4 were given'):
        bind(InCall())(X, True, 3)


class Around(nn.Module):
    """Has modules as fields and does not pass the flag to them."""

    alone: nn.Module
    listed: Any
    named: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        parts = (self.alone, *self.listed, *self.named.values())
        return [part(x) for part in parts]


def test_modules_in_fields_get_the_flag() -> None:
    once, explicit = InConstructor(), InConstructor(training=True)
    module = Around(
        once, (InConstructorInverted(), explicit), {'b': once, 'a': Around(once, [], {})}
    )
    assert bind(module, 'train')(X) == [True, True, True, True, [True]]
    assert bind(module, 'eval')(X) == [False, False, True, False, [False]]
    assert once.training is False


class Shared(nn.Module):
    """Parameters, and a training flag in a field only."""

    training: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(4)(x)


def test_a_module_in_two_fields_stays_shared() -> None:
    dense = Shared()
    first, *others = bind(Around(dense, (dense,), {'a': dense}), 'train')(X)
    assert all(same(first, other) for other in others)


def test_layers_of_a_sequential_model_get_the_flag() -> None:
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
    """Sets the flag of a submodule itself."""

    def setup(self) -> None:
        self.part = nn.Sequential([InCall()])

    def __call__(self, x: Any) -> Any:
        return self.part(x)


def test_a_module_that_passes_the_flag_itself() -> None:
    assert bind(Frozen())(X) is False
    assert bind(nn.Sequential([Frozen()]))(X) is False


class PassesFlag(nn.Module):
    """Passes the flag to a module in a field, in the call."""

    part: nn.Module

    def __call__(self, x: Any, train: bool) -> Any:
        return self.part(x, deterministic=not train)


def test_a_flag_of_the_call_is_not_set_in_fields() -> None:
    """Flax refuses a flag that is set in both the constructor and the call."""
    assert set(bind(PassesFlag(nn.Dropout(0.5)))(jnp.ones(99)).tolist()) == {0.0, 2.0}


class Static(nn.Module):
    """Branches in Python on its flag, so this must be a Python bool."""

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
def test_lifted_models_get_the_flag_by_position(module: type[nn.Module]) -> None:
    x = jnp.ones((8, 16))
    task = lambda model, batch: model(x)  # noqa: E731
    assert set(bind(module(), task=task)(x).flatten().tolist()) == {0.0, 2.0}
    assert same(bind(module(), 'eval', task=task)(x), x)


@flax.struct.dataclass
class Settings:
    """As the examples of Flax have them."""

    width: int = 3
    deterministic: bool = False


@dataclasses.dataclass(frozen=True)
class Nested:
    encoder: Settings = dataclasses.field(default_factory=Settings)
    depth: int = 1


class Part(nn.Module):
    settings: Settings

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return not self.settings.deterministic


class WithSettings(nn.Module):
    settings: Settings | Nested

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Part(getattr(self.settings, 'encoder', self.settings))(x)


@pytest.mark.parametrize('settings', [Settings(), Nested(), Nested(encoder=Settings(width=5))])
def test_settings_of_the_model_get_the_flag(settings: Settings | Nested) -> None:
    module = WithSettings(settings)
    assert bind(module, 'train')(X) is True
    assert bind(module, 'eval')(X) is False
    assert module.settings is settings


def test_settings_that_the_user_has_changed_are_kept() -> None:
    module = WithSettings(Settings(deterministic=True))
    assert bind(module, 'train')(X) is False


@dataclasses.dataclass
class Counts:
    train: int = 100
    itself: Any = None


def test_numbers_are_no_flags_and_settings_may_be_circular() -> None:
    counts = Counts()
    counts.itself = counts
    module = WithSettings(Settings(), name=None)
    changed = set_fields(dataclasses.replace(module, settings=counts), False)
    assert changed.settings.train == 100
