# SPDX-License-Identifier: Apache-2.0
"""NNX modules: variables of all kinds, the training flag, and random numbers of a call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.modules.examples import X, bind, init, same
from trainer.config.errors import UserError
from trainer.modules.ensemble import EnsembleModel
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys


class Count(nnx.Variable):
    """A custom class of variables."""


class Buffers(nnx.Module):
    """Arrays outside of variables, static values, and a variable that is a dict."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.scale = np.array(2.0, np.float32)
        self.offset = jnp.arange(4.0)
        self.pair = Count({'a': jnp.zeros(()), 'b': jnp.zeros(3)})
        self.number, self.names = 3, ('a', 'b')

    def __call__(self, x: jax.Array) -> jax.Array:
        self.offset = self.offset + 1
        return self.linear(x) * self.scale + self.offset


@pytest.mark.parametrize('run', [lambda f: f, jax.jit], ids=['as it is', 'traced'])
def test_arrays_outside_of_variables(run: Any) -> None:
    """They are part of the state, and a training call can assign them."""
    system = as_functional(Buffers)
    variables = run(lambda: system.init(lambda *_: None, {}, Keys(seed=0, mode='init')))()
    assert set(variables) == {'params', 'buffers', 'count'}
    assert same(variables['buffers']['offset'], jnp.arange(4.0))

    def call(variables: Any, mode: str) -> Any:
        model: Any = system.bind(variables, Keys(seed=0, mode=mode))
        return model(X), model.collections

    linear = variables['params']['linear']
    expected = (X @ linear['kernel'] + linear['bias']) * 2 + jnp.arange(4.0) + 1
    for mode, after in (('train', 1), ('eval', 0)):
        output, collections = run(lambda v, mode=mode: call(v, mode))(variables)
        np.testing.assert_allclose(output, expected, rtol=1e-5)
        assert same(collections['buffers']['offset'], jnp.arange(4.0) + after)


def test_a_list_of_modules_is_an_error() -> None:
    """With NNX's own advice."""

    class Listed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = [nnx.Linear(4, 4, rngs=rngs)]

    with pytest.raises(ValueError, match=r'nnx\.List'):
        init(Listed)


class Lifted(nnx.Module):
    """An NNX transform around a layer with statistics and dropout."""

    def __init__(self, lift: Any, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.lift = lift

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lift(lambda m, x: m.drop(m.norm(m.linear(x))))(self, x)


@pytest.mark.parametrize('lift', [nnx.remat, nnx.jit])
def test_transforms_within_a_module(lift: Any) -> None:
    """Outputs, statistics and masks equal those without the transform."""
    plain = bind(lambda rngs: Lifted(lambda f: f, rngs))
    lifted = bind(lambda rngs: Lifted(lift, rngs))
    x = jax.random.normal(jax.random.key(0), (16, 4))
    np.testing.assert_allclose(lifted(x), plain(x), rtol=1e-4, atol=1e-6)
    found, expected = lifted.collections, plain.collections
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


class PresetMode(nnx.Module):
    """The constructor sets a mode."""

    def __init__(self, training: bool, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(4, use_running_average=not training, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=not training, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(x))


@pytest.mark.parametrize('training', [True, False])
def test_the_mode_set_by_the_constructor_is_ignored(training: bool) -> None:
    """In evaluation, initial statistics and no dropout leave the input unchanged."""

    def make(rngs: nnx.Rngs) -> PresetMode:
        return PresetMode(training, rngs)

    np.testing.assert_allclose(bind(make, 'eval')(X), X, rtol=1e-4)
    trained = bind(make)
    assert (trained(X + 1) == 0).any()
    assert not same(trained.collections['batch_stats']['norm']['mean'], jnp.zeros(4))


class Flagged(nnx.Module):
    """Requires a training flag in its call."""

    def __init__(self, rngs: nnx.Rngs):
        self.drop = nnx.Dropout(0.5)
        self.rngs = rngs

    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        return self.drop(x + 1, deterministic=deterministic, rngs=self.rngs)


def test_flags_of_the_call() -> None:
    assert same(bind(Flagged, 'eval')(X), X + 1)
    assert (bind(Flagged)(X) == 0).any()


class Noise(nnx.Module):
    """Draws from the `rngs` of its call, as in the README of NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs) -> jax.Array:
        halves = [self.drop(x + 1, deterministic=not train, rngs=rngs) for _ in range(2)]
        return jnp.stack(halves)


class MayDraw(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, own: bool = False):
        self.drop = nnx.Dropout(0.5, rngs=rngs if own else None)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        noise = 0 if rngs is None else rngs.noise.uniform(x.shape)
        return self.drop(x + 1 + noise, rngs=rngs)


def test_random_numbers_of_the_call() -> None:
    """A call gets `rngs` if it requires them, or takes them and has no others."""
    system = as_functional(Noise)
    x = jnp.ones((32, 4))

    def bind_at(step: int, mode: Any = 'train') -> Any:
        return system.bind({'params': {}}, Keys(seed=0, mode=mode, step=step))

    model = bind_at(1)
    first, second = model(x)
    assert not same(first, second)
    assert not same(model(x)[0], first)
    assert same(bind_at(1)(x)[0], first)
    assert not same(bind_at(2)(x)[0], first)
    assert same(bind_at(1, 'eval')(x)[0], x + 1)
    mine = bind_at(1)(x, rngs=nnx.Rngs(0))
    assert same(mine, bind_at(2)(x, rngs=nnx.Rngs(0)))
    assert (bind(MayDraw)(X) == 0).any()
    assert same(bind(MayDraw, 'eval')(X), X + 1)
    own = bind(lambda rngs: MayDraw(rngs, own=True))
    assert same(own(X), bind(lambda rngs: MayDraw(rngs, own=True))(X, None))


class Perturbed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.perturb('inner', self.linear(x))


def test_perturbations_are_not_in_the_state() -> None:
    """A perturbation adds zero to the output, and no collection stores it."""
    model = bind(Perturbed)
    np.testing.assert_allclose(model(X), X @ model.params['linear']['kernel'], rtol=1e-5)
    assert model.collections == {}


class Filled(nnx.Module):
    """Creates its intermediate in the constructor; a call fills or replaces it."""

    def __init__(self, fills: bool, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.mean = nnx.Intermediate(jnp.ones(()))
        self.fills = fills

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.linear(x)
        if self.fills:
            self.mean[...] = y.mean()
        else:
            self.mean = nnx.Intermediate(y.mean())
        return y


@pytest.mark.parametrize('fills', [True, False])
def test_an_intermediate_created_in_the_constructor(fills: bool) -> None:
    """Each call sets its value, and no collection stores it."""
    model = bind(lambda rngs: Filled(fills, rngs))
    for _ in range(2):
        np.testing.assert_allclose(model.intermediates.get('mean', 0.0), 0.0)
        output = model(X)
        assert same(model.intermediates['mean'], output.mean())
        model.intermediates.clear()
    assert model.collections == {}


class Params(nnx.Variable):
    """Not parameters."""


class BatchStats(nnx.BatchStat):
    """Batch statistics, by another name."""


@pytest.mark.parametrize(('kind', 'refused'), [(Params, True), (BatchStats, False)])
def test_a_class_of_variables_with_a_reserved_name(kind: Any, refused: bool) -> None:
    """Otherwise they would be trained."""

    class Extra(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.extra = kind(jnp.zeros(()))

    if not refused:
        assert init(Extra) == {'params': {}, 'batch_stats': {'extra': 0}}
        return
    with pytest.raises(
        UserError, match=r"test_nnx_parts\.Params would be the collection 'params'.*nnx\.Param"
    ):
        init(Extra)


class Tempered(nnx.Module):
    """A parameter and a statistic that tasks read."""

    def __init__(self, rngs: nnx.Rngs):
        self.temperature = nnx.Param(jnp.full((), 2.0))
        self.seen = Count(jnp.zeros((), jnp.int32))
        self.offset = jnp.ones(4)
        self.sizes = (1, 2)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        self.seen[...] += 1
        return x


def test_variables_are_read_by_name() -> None:
    """With the view's parameters and their gradients, and with updates of earlier calls."""
    variables = init(Tempered)

    def read(params: Any) -> Any:
        keys = Keys(seed=0, mode='train')
        average = {**params, 'temperature': jnp.full((), 7.0)}
        model: Any = as_functional(Tempered).bind(
            {**variables, 'params': params}, keys, ema=average
        )
        model(X), model(X)
        stopped = model.stop_gradient('temperature').temperature
        assert model.ema.temperature == 7
        return model.temperature * stopped, (model.seen, model.sizes, model.offset)

    value, gradients = jax.value_and_grad(read, has_aux=True)(variables['params'])
    assert value[0] == 4 and gradients['temperature'] == 2
    seen, sizes, offset = value[1]
    assert (seen, sizes) == (2, (1, 2)) and same(offset, jnp.ones(4))
    assert bind(Tempered).layers[0](X).shape == (3, 4)


def test_a_variable_of_an_ensemble_is_an_error() -> None:
    variables = jax.tree.map(lambda x: jnp.stack([x, x + 1]), init(Tempered))
    keys, seeds = Keys(seed=0, mode='eval'), jnp.arange(2)
    model: Any = EnsembleModel(as_functional(Tempered), variables, keys, seeds, combine=lambda x: x)
    with pytest.raises(
        UserError, match=r'model\.temperature differs between the members .*model\.variables'
    ):
        model.temperature  # noqa: B018
    assert model.sizes == (1, 2)


@pytest.mark.parametrize('name', ['train', 'eval'])
def test_an_attribute_that_hides_train_or_eval(name: str) -> None:
    """The message names it."""

    class Switched(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            setattr(self, name, True)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.linear(x)

    with pytest.raises(UserError, match=rf'Switched\.{name} hides the method `{name}\(\)`'):
        bind(Switched, name)(X)


def test_a_module_created_without_rngs(caplog: pytest.LogCaptureFixture) -> None:
    """Its parameters do not depend on the seed: a warning says so, if it has any."""
    as_functional(nnx.Dropout(0.5))
    assert caplog.text == ''
    as_functional(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    assert 'config.model: Linear was created without the `rngs`' in caplog.text
