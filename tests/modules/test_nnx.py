# SPDX-License-Identifier: Apache-2.0
"""NNX modules in the place of Linen ones: rows X1 to X14."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests import command
from tests.command import ROOT
from tests.modules.examples import X, bind, init, same
from trainer.config.errors import UserError
from trainer.experiment import Experiment, load_and_build
from trainer.modules import functional
from trainer.step.precision import Precision
from trainer.step.rng import Keys
from trainer.trainer import Trainer


class Count(nnx.Variable):
    """How often a module was called."""


class Model(nnx.Module):
    """Batch statistics, two dropouts, a counter and intermediates of both kinds."""

    width = 5

    def __init__(self, rate: float = 0.5, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drops = nnx.List([nnx.Dropout(rate, rngs=rngs) for _ in range(2)])
        self.calls = Count(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        y = self.norm(self.first(x))
        self.sow(nnx.Intermediate, 'sown', y.mean())
        self.assigned = nnx.Intermediate(y.sum())
        return jnp.stack([drop(jnp.ones_like(y)) * y for drop in self.drops])

    def encode(self, x: jax.Array) -> jax.Array:
        return self.first(x)


def make(rngs: nnx.Rngs) -> Model:
    return Model(rngs=rngs)


def test_variables_are_kept_by_kind_and_path() -> None:
    """X1, X7: nested dicts by name; nothing random among them."""
    variables = init(make)
    assert set(variables) == {'params', 'batch_stats', 'count'}
    assert set(variables['params']) == {'first', 'norm'}
    assert set(variables['batch_stats']['norm']) == {'mean', 'var'}
    assert variables['count']['calls'] == 0
    again = init(make)
    jax.tree.map(lambda a, b: same(a, b) or pytest.fail('differs'), variables, again)
    kernel = functional(make).init(lambda *_: None, {}, Keys(seed=1, mode='init'))
    assert not same(kernel['params']['first']['kernel'], variables['params']['first']['kernel'])


def test_training_changes_what_it_should() -> None:
    """X1, X13: a counter counts, statistics move; an evaluation leaves both alone."""
    model = bind(make)
    model(X), model(X)
    assert model.collections['count']['calls'] == 2
    assert not same(model.collections['batch_stats']['norm']['mean'], jnp.zeros(5))
    evaluated = bind(make, 'eval')
    before = jax.tree.map(np.asarray, evaluated.collections)
    first, second = evaluated(X), evaluated(X)
    assert same(first, second) and same(first[0], first[1])
    jax.tree.map(np.testing.assert_array_equal, evaluated.collections, before)


def test_dropout_draws_by_the_rule() -> None:
    """X2: equal in the same place of a run, different for each layer, call, step and slice."""
    one, other = bind(make), bind(make)
    a, b = one(X), one(X)
    assert same(a, other(X))
    masks = [a[0] == 0, a[1] == 0, b[0] == 0, b[1] == 0]
    for i, mask in enumerate(masks):
        assert 0 < mask.sum() < mask.size
        assert not any(same(mask, rest) for rest in masks[i + 1 :])
    variables = init(make)
    for keys in (Keys(seed=0, mode='train', step=4), Keys(seed=0, mode='train', step=3, index=1)):
        elsewhere = functional(make).bind(variables, keys)(X)
        assert not same(elsewhere[0] == 0, masks[0])


def test_intermediates_are_offered_and_not_kept() -> None:
    """X10: what was sown and what was assigned."""
    model: Any = bind(make)
    model(X)
    assert set(model.intermediates) == {'sown', 'assigned'}
    assert set(model.collections) == {'batch_stats', 'count'}


def test_parts_methods_and_numbers() -> None:
    model = bind(make, 'eval')
    kernel, bias = (model.params['first'][name] for name in ('kernel', 'bias'))
    np.testing.assert_allclose(model.first(X), X @ kernel + bias, rtol=1e-5)
    assert same(model.encode(X), model.first(X))
    assert model.width == 5
    assert same(model.drops[0](X), X)


def test_views() -> None:
    variables = init(make)
    zeros = jax.tree.map(jnp.zeros_like, variables['params'])

    def loss(params: Any) -> Any:
        keys = Keys(seed=0, mode='train')
        model = functional(make).bind({**variables, 'params': params}, keys, ema=zeros)
        assert same(model.ema.encode(X), jnp.zeros((3, 5)))
        return model.stop_gradient('first/bias').encode(X).sum()

    grads = jax.grad(loss)(variables['params'])
    assert same(grads['first']['bias'], jnp.zeros(5))
    assert not same(grads['first']['kernel'], jnp.zeros((4, 5)))
    with pytest.raises(UserError, match='matches no parameter'):
        bind(make).stop_gradient('nothing')


class Shared(nnx.Module):
    """X13: one linear layer in two places."""

    def __init__(self, rngs: nnx.Rngs):
        self.one = nnx.Linear(4, 4, rngs=rngs)
        self.two = self.one

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.two(self.one(x))


def test_a_shared_module_is_one_set_of_parameters() -> None:
    variables = init(Shared)
    assert len(jax.tree.leaves(variables['params'])) == 2
    kernel, bias = variables['params']['one']['kernel'], variables['params']['one']['bias']

    def mine(params: Any) -> Any:
        bound = functional(Shared).bind({'params': params}, Keys(seed=0, mode='train'))
        return bound(X).sum()

    grads = jax.grad(mine)(variables['params'])
    expected = jax.grad(lambda k: ((X @ k + bias) @ k + bias).sum())(kernel)
    np.testing.assert_allclose(grads['one']['kernel'], expected, rtol=1e-5)


class Stacked(nnx.Module):
    """X12: five layers made by `nnx.vmap` and run by `nnx.scan`, each with its own dropout."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=5)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def layers(rngs: nnx.Rngs) -> Layer:
            return Layer(rngs)

        self.layers = layers(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def run(x: jax.Array, layer: Layer) -> Any:
            mask = layer.drop(jnp.ones(20))
            return nnx.relu(layer.linear(x)), mask

        return run(x, self.layers)[1]


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def test_layers_that_are_scanned_over() -> None:
    model = bind(Stacked)
    assert model.params['layers']['linear']['kernel'].shape == (5, 4, 4)
    kernels = model.params['layers']['linear']['kernel']
    assert not same(kernels[0], kernels[1])
    masks = np.asarray(model(X))
    assert len(np.unique(masks, axis=0)) == 5


class Growing(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.new = Count(x.sum())
        return self.linear(x)


def test_a_variable_that_a_call_makes_is_refused() -> None:
    with pytest.raises(ValueError, match=r'must be an nnx\.Intermediate'):
        bind(Growing)(X)


def test_dtypes() -> None:
    precision = Precision(params=jnp.float32, compute=jnp.bfloat16, output=jnp.float32)
    model = functional(make, precision)
    variables = model.init(lambda *_: None, {}, Keys(seed=0, mode='init'))
    bound = model.bind(variables, Keys(seed=0, mode='train'))
    assert bound(X).dtype == jnp.float32
    assert bound.collections['batch_stats']['norm']['mean'].dtype == jnp.float32
    exact = functional(make).bind(variables, Keys(seed=0, mode='train'))(X)
    assert not same(bound(X), exact)


def experiment(target: str, **options: Any) -> Experiment:
    small = {
        'train_for': '20 steps', 'evals': {}, 'log__every': '1 steps', 'checkpoint__every': 'never',
        'data__source__limit': 640, 'model__target': target,
    }  # fmt: skip
    return load_and_build(str(ROOT / 'configs' / 'mnist.py'), **{**small, **options})


def losses(trainer: Trainer, state: Any) -> list[float]:
    found = []
    with trainer.batches(0, [1] * 20) as batches:
        for _, batch in batches:
            state = trainer.programs.step(state, batch)
            found.append(float(state.metrics['task'].loss.total))
    return list(np.diff([0.0, *found]))


def test_the_same_network_in_both_has_the_same_losses() -> None:
    """The quickstart CNN with copied parameters: twenty steps of momentum."""
    options = {'model__features': (8, 16), 'model__hidden': 32}
    linen = Trainer(experiment('models.cnn:CNN', **options))
    mine = Trainer(experiment('models.cnn_nnx:CNN', **options))
    names = {'Conv_0': 'conv1', 'Conv_1': 'conv2', 'Dense_0': 'dense1', 'Dense_1': 'dense2'}
    state, other = linen.init_state(), mine.init_state()
    copied = {names[name]: jax.tree.map(jnp.copy, value) for name, value in state.params.items()}
    assert jax.tree.structure(copied) == jax.tree.structure(other.params)
    expected = losses(linen, state)
    found = losses(mine, dataclasses.replace(other, params=copied))
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


def test_a_resumed_run_is_the_same_run(tmp_path: pathlib.Path) -> None:
    """With dropout, to the last bit; one compile of each program."""
    digests = []
    for name, pauses in (('whole', ()), ('parts', (7,))):
        made = experiment(
            'models.cnn_nnx:CNN', model__dropout_rate=0.5, model__features=(8, 16),
            checkpoint__every='5 steps',
        )  # fmt: skip
        for steps in pauses:
            Trainer(made, str(tmp_path / name)).fit(max_steps=steps)
        trainer = Trainer(made, str(tmp_path / name))
        trainer.fit()
        assert trainer.programs.step.compiles == 1
        digests.append(command.result(tmp_path / name)['digest'])
    assert digests[0] == digests[1]


class Named(nnx.Module):
    """Parameters that name their dimensions."""

    def __init__(self, rngs: nnx.Rngs):
        def kernel(*names: str | None) -> Any:
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)

        self.first = nnx.Linear(784, 64, kernel_init=kernel('embed', 'mlp'), rngs=rngs)
        self.last = nnx.Linear(64, 10, kernel_init=kernel('mlp', None), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.first(x.reshape(len(x), -1))))


def test_names_of_dimensions_follow_the_rules() -> None:
    """J8 in NNX: cut by name, momentum with it; the losses are those of one device."""
    rules = {
        'target': 'trainer.parallel.sharding:ByName',
        'rules': (('batch', 'data'), ('embed', 'fsdp'), ('mlp', 'model')),
    }
    found = []
    for mesh in ({'data': 8, 'fsdp': 1, 'model': 1}, {'data': 2, 'fsdp': 2, 'model': 2}):
        trainer = Trainer(experiment(f'{__name__}:Named', sharding=(rules,), mesh=mesh))
        state = trainer.init_state()
        kernel = state.params['first']['kernel']
        assert kernel.sharding.spec == P('fsdp', 'model')
        shape = (784 // mesh['fsdp'], 64 // mesh['model'])
        assert {s.data.shape for s in kernel.addressable_shards} == {shape}
        slots = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (784, 64)]
        assert slots and all(x.sharding.spec == P('fsdp', 'model') for x in slots)
        found.append(losses(trainer, state))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


class LinenInside(nnx.Module):
    """A bridge that has no parameters before its first input."""

    def __init__(self, rngs: nnx.Rngs):
        self.linen = nnx.bridge.ToNNX(nn.Dense(16), rngs=rngs)
        self.out = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.linen(x.reshape(len(x), -1))))


class Inner(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(784, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


class NNXInside(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.bridge.to_linen(Inner)(x.reshape(len(x), -1))


@pytest.mark.parametrize('name', ['LinenInside', 'NNXInside'])
def test_bridges_train(name: str, tmp_path: pathlib.Path) -> None:
    """X14: either system inside the other."""
    made = experiment(f'{__name__}:{name}', checkpoint__every='10 steps')
    result = Trainer(made, str(tmp_path)).fit()
    assert result.metrics['train/loss'] < 2.3
    restored = Trainer(made, str(tmp_path)).restore()
    for a, b in zip(
        jax.tree.leaves(restored.params), jax.tree.leaves(result.state.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_mistakes_are_told_as_for_linen() -> None:
    with pytest.raises(
        UserError, match=r'model\.featurs: .*Did you mean config\.model\.features\?'
    ):
        experiment('models.cnn_nnx:CNN', model__featurs=(8, 16))
    with pytest.raises(UserError, match='got a function that returns int'):
        init(lambda rngs: 3)
    with pytest.raises(TypeError, match=r'expected a module of flax\.linen or flax\.nnx, got int'):
        functional(3)
