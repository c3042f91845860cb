# SPDX-License-Identifier: Apache-2.0
"""Config models that are not Flax modules are refused before anything is called or compiled."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.modules.learning import train_and_check, trainer
from trainer.config.errors import UserError, full_text
from trainer.modules.functional import as_functional


class Callable4:
    """A callable object, like a module of Equinox."""

    def __init__(self) -> None:
        self.weight = np.ones((8, 4))

    def __call__(self, x: Any) -> Any:
        return x @ self.weight


def class_of_library(package: str, base: type = object) -> Any:
    """Returns a subclass of a class of another library."""
    return type('Net', (type('Module', (base,), {'__module__': f'{package}.core'}),), {})


equinox = class_of_library('equinox', Callable4)
torch = class_of_library('torch', Callable4)


class Wrapper:
    """A model with module and parameters as attributes, like those of transformers."""

    module_class = nn.Dense

    def __init__(self) -> None:
        self.module = nn.Dense(4)

    def __call__(self, inputs: Any, params: Any = None, dropout_rng: Any = None) -> Any:
        return self.module.apply({'params': params}, inputs)


class Transformed(NamedTuple):
    """Two functions, as `haiku.transform` returns them."""

    init: Any
    apply: Any


def _init(key: Any, x: Any) -> dict[str, jax.Array]:
    return {'w': 0.1 * jax.random.normal(key, (x.shape[-1], 4))}


def make_transformed() -> Transformed:
    return Transformed(_init, lambda params, key, x: x @ params['w'])


def forward(x: Any) -> Any:
    return jnp.tanh(x)


def with_params(params: Any, x: Any) -> Any:
    return x @ params


def makes_linen(rngs: Any) -> nn.Module:
    return nn.Dense(4)


def makes_foreign(rngs: Any) -> Any:
    return equinox()


def no_rngs() -> nn.Module:
    return nn.Dense(4)


jitted = jax.jit(forward)
bound = functools.partial(with_params, 1)
instance = Callable4()
method = nn.Dense(4).apply
linen_class = nn.Dense
array = np.ones(3)
tree = {'w': array}

EXPECTED = r'expected a module of flax\.linen or flax\.nnx, got '
REFUSED = {
    'target:Callable4': rf'^config\.model: {EXPECTED}Callable4\. Write the model as a Flax module',
    'target:equinox': rf'^config\.model\.target: {EXPECTED}the class Net of Equinox\.',
    'target:torch': rf'{EXPECTED}the class Net of PyTorch\..*config\.init_from reads',
    'target:make_transformed': rf'{EXPECTED}Transformed\.',
    'target:Wrapper': rf'{EXPECTED}Wrapper\. Its attribute `module` is a Flax module \(Dense\)',
    'target:makes_foreign': rf'{EXPECTED}a function that returns Net of Equinox',
    'target:makes_linen': r'a function of `rngs` that returns Dense, a module of flax\.linen',
    'target:forward': r'model\.x is missing: .*called once, with the other keys .*not with inputs',
    'ref:instance': rf'{EXPECTED}Callable4\.',
    'ref:Callable4': rf'{EXPECTED}the class Callable4\.',
    'ref:Wrapper': r'is a Flax module: set config\.model\.target to flax\.linen\.linear',
    'ref:forward': rf'{EXPECTED}the function forward\(x\)\. A model has parameters',
    'ref:jitted': rf'{EXPECTED}the function forward\(x',
    'ref:bound': rf'{EXPECTED}the function with_params\(x',
    'ref:with_params': rf'{EXPECTED}the function with_params\(params',
    'ref:no_rngs': rf'{EXPECTED}the function no_rngs\(\).*set config\.model\.target',
    'ref:method': r"got the method 'apply' of a module \(Dense\)\. Set config\.model to the module",
    'ref:linen_class': r'got the flax\.linen module class Dense; use it as config\.model\.target',
    'ref:array': rf'{EXPECTED}ndarray\.',
    'ref:tree': rf'{EXPECTED}dict\.',
}


@pytest.mark.parametrize('name', REFUSED)
def test_other_objects_are_refused(name: str) -> None:
    key, _, attribute = name.partition(':')
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        trainer({key: f'{__name__}:{attribute}'}).set_up().programs  # noqa: B018
    assert '\n' not in full_text(caught.value)


@pytest.mark.slow
def test_haiku_functions_can_be_wrapped_in_linen() -> None:
    """As the message advises."""
    made = type('Transformed', (Transformed,), {'__module__': 'haiku._src.transform'})
    with pytest.raises(TypeError, match=r'got Transformed of Haiku\..* self\.param\("net", net.i'):
        as_functional(made(*make_transformed()))
    train_and_check({'target': f'{__name__}:HaikuParams'}, steps=100)


class HaikuParams(nn.Module):
    """Holds the parameters of another library's functions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        net = make_transformed()
        params = self.param('net', net.init, x)
        return net.apply(params, None, x)


class OnlyByName(nnx.Linear):
    """A class that takes `rngs` by name only."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(8, 4, rngs=rngs)


class Factory:
    """An object that creates a module."""

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(8, 4, rngs=rngs)


def make_part(streams: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(8, 4, rngs=streams)


factory = Factory()
part = functools.partial(nnx.Linear, 8, 4)
by_key = functools.partial(OnlyByName)


@pytest.mark.parametrize(
    'name',
    ['OnlyByName', 'factory', 'make_part', 'part', 'by_key', 'by_position', 'make_positional'],
)
def test_factories_are_accepted(name: str) -> None:
    parameters = trainer({'ref': f'{__name__}:{name}'}).set_up().programs.abstract.params
    assert parameters['kernel'].shape == (8, 4)


class ByPosition:
    """A factory whose argument has another name."""

    def __call__(self, streams: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(8, 4, rngs=streams)


def make_positional(rngs: nnx.Rngs, /) -> nnx.Module:
    return nnx.Linear(8, 4, rngs=rngs)


by_position = ByPosition()


def test_a_failing_factory_explains_its_error() -> None:
    def make(streams: Any) -> Any:
        return streams @ jnp.ones((8, 4))

    def wrong(streams: Any) -> Any:
        return nnx.Linear(8, 'four', rngs=streams)  # type: ignore[arg-type]

    def raise_error(rngs: Any) -> Any:
        raise ZeroDivisionError('of its own')

    from trainer.modules.rng import Keys

    with pytest.raises(UserError, match=r'got the function make\(streams.*called with `rngs`: '):
        as_functional(make).init(lambda *_: None, {}, Keys(seed=0, mode='init'))
    with pytest.raises(TypeError) as raised:  # An error in the module, not in its factory.
        as_functional(wrong).init(lambda *_: None, {}, Keys(seed=0, mode='init'))
    assert not isinstance(raised.value, UserError)
    with pytest.raises(ZeroDivisionError):
        as_functional(raise_error).init(lambda *_: None, {}, Keys(seed=0, mode='init'))
