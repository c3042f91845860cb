# SPDX-License-Identifier: Apache-2.0
"""NNX modules in the trainer, compared with Linen modules."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec as P

from tests import command
from tests.command import ROOT
from tests.modules.examples import init
from trainer.config.errors import UserError
from trainer.experiment import Experiment, load_and_build
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys
from trainer.trainer import Trainer

EVALS = {
    'test': {
        'every': 'never',
        'data': {
            'source': {'target': 'trainer.data.mnist:MNIST', 'split': 'test', 'limit': 300},
            'device_transforms': ({'target': 'trainer.data.transforms:ToFloat'},),
            'batch_size': 128,
        },
    }
}


def experiment(target: str, **options: Any) -> Experiment:
    small = {
        'train_for': '20 steps', 'evals': {}, 'log__every': '1 steps', 'checkpoint__every': 'never',
        'data__source__limit': 640, 'model__target': target,
    }  # fmt: skip
    return load_and_build(str(ROOT / 'configs' / 'mnist.py'), **{**small, **options})


def train(trainer: Trainer, state: Any) -> tuple[list[float], Any]:
    found = []
    with trainer.batches(0, [1] * 20) as batches:
        for batch in batches:
            state = trainer.set_up().programs.step(state, batch.arrays)
            found.append(float(state.metrics['task'].loss.total))
    return list(np.diff([0.0, *found])), state


def losses(trainer: Trainer, state: Any) -> list[float]:
    return train(trainer, state)[0]


@pytest.mark.slow
def test_nnx_and_linen_have_the_same_losses() -> None:
    """The quickstart CNN with copied parameters: twenty steps of momentum."""
    options = {'model__features': (8, 16), 'model__hidden': 32}
    linen = Trainer(experiment('trainer.models.cnn:CNN', **options))
    mine = Trainer(experiment('trainer.models.cnn_nnx:CNN', **options))
    names = {'Conv_0': 'conv1', 'Conv_1': 'conv2', 'Dense_0': 'dense1', 'Dense_1': 'dense2'}
    state, other = linen.init_state(), mine.init_state()
    copied = {names[name]: jax.tree.map(jnp.copy, value) for name, value in state.params.items()}
    assert jax.tree.structure(copied) == jax.tree.structure(other.params)
    expected = losses(linen, state)
    found = losses(mine, dataclasses.replace(other, params=copied))
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


@pytest.mark.slow
def test_batch_statistics_equal_those_of_linen() -> None:
    """An MLP with batch norm and copied parameters: twenty steps, then an evaluation."""
    linen, mine = (
        Trainer(experiment(model, model__batch_norm=True, evals=EVALS))
        for model in ('trainer.models.mlp:MLP', 'trainer.models.mlp_nnx:MLP')
    )
    state, other = linen.init_state(), mine.init_state()

    def rename(tree: Any) -> Any:
        names = {'Dense_0': ('dense', '0'), 'Dense_1': ('dense', '1'), 'BatchNorm_0': ('norm', '0')}
        moved = {names[name]: jax.tree.map(jnp.copy, value) for name, value in tree.items()}
        return traverse_util.unflatten_dict(moved)

    other = dataclasses.replace(other, params=rename(state.params))
    expected, state = train(linen, state)
    found, other = train(mine, other)
    assert found == pytest.approx(expected, rel=1e-4)
    statistics = rename(state.collections['batch_stats'])
    assert jax.tree.structure(statistics) == jax.tree.structure(other.collections['batch_stats'])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        other.collections['batch_stats'],
        statistics,
    )
    one, two = (
        linen.set_up().evaluators['test'].run(state),
        mine.set_up().evaluators['test'].run(other),
    )
    assert two['examples'] == 300
    assert two == pytest.approx(one, rel=1e-3)
    mine.set_up().evaluators['test'].run(mine.init_state())
    assert (mine.set_up().programs.step.compiles, mine.set_up().evaluators['test'].compiles) == (
        1,
        1,
    )


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: pathlib.Path) -> None:
    """With dropout, bitwise; each program compiles once."""
    digests = []
    for name, pauses in (('whole', ()), ('parts', (7,))):
        made = experiment(
            'trainer.models.cnn_nnx:CNN', model__dropout_rate=0.5, model__features=(8, 16),
            checkpoint__every='5 steps',
        )  # fmt: skip
        for steps in pauses:
            Trainer(made, str(tmp_path / name)).fit(max_steps=steps)
        trainer = Trainer(made, str(tmp_path / name))
        trainer.fit()
        assert trainer.set_up().programs.step.compiles == 1
        digests.append(command.result(tmp_path / name)['digest'])
    assert digests[0] == digests[1]


class Named(nnx.Module):
    """Parameters with dimension names."""

    def __init__(self, rngs: nnx.Rngs):
        def kernel(*names: str | None) -> Any:
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)

        self.first = nnx.Linear(784, 64, kernel_init=kernel('embed', 'mlp'), rngs=rngs)
        self.last = nnx.Linear(64, 10, kernel_init=kernel('mlp', None), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.first(x.reshape(len(x), -1))))


@pytest.mark.slow
def test_dimension_names_follow_the_rules() -> None:
    """Parameters and momentum are sharded by name; losses equal those on one device."""
    rules = {
        'target': 'trainer.sharding:ByName',
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


class Layers(nnx.Module):
    """Layers created by `nnx.vmap`, with a name for the stacked dimension and a counter."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=4)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: 'layers'})
        def make(rngs: nnx.Rngs) -> Layer:
            return Layer(rngs)

        self.layers = make(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: 'layers'},
        )
        def run(x: jax.Array, layer: Layer) -> jax.Array:
            return layer(x)

        return run(x.reshape(len(x), 16, -1).sum(-1), self.layers)[:, :10]


class Calls(nnx.Variable):
    """The number of calls of a layer."""


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ('embed', 'mlp'))
        self.linear = nnx.Linear(16, 16, kernel_init=init, rngs=rngs)
        self.calls = Calls(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return nnx.tanh(self.linear(x))


@pytest.mark.slow
def test_names_of_stacked_layers_and_a_counter() -> None:
    """In NNX too, stacking adds a dimension name; the counter counts the steps."""
    rules = {
        'target': 'trainer.sharding:ByName',
        'rules': (('batch', 'data'), ('mlp', 'model')),
    }
    mesh = {'data': 4, 'model': 2}
    trainer = Trainer(experiment(f'{__name__}:Layers', sharding=(rules,), mesh=mesh))
    state = trainer.init_state()
    kernel = state.params['layers']['linear']['kernel']
    assert kernel.shape == (4, 16, 16)
    assert kernel.sharding.spec == P(None, None, 'model')
    assert {s.data.shape for s in kernel.addressable_shards} == {(4, 16, 8)}
    _, state = train(trainer, state)
    assert state.collections['calls']['layers']['calls'].tolist() == [20] * 4


@pytest.mark.slow
def test_parameters_sharded_by_size() -> None:
    """Eight devices: the losses do not depend on the sharding of the parameters."""
    rule = {'target': 'trainer.sharding:FSDP', 'min_bytes': 0}
    found = []
    for mesh, sharding in (({'data': 8}, 'replicated'), ({'data': 2, 'fsdp': 4}, (rule,))):
        made = experiment('trainer.models.mlp_nnx:MLP', mesh=mesh, sharding=sharding)
        trainer = Trainer(made)
        state = trainer.init_state()
        found.append(losses(trainer, state))
        if 'fsdp' in mesh:
            kernel = trainer.init_state().params['dense']['0']['kernel']
            assert {s.data.shape for s in kernel.addressable_shards} == {(196, 64)}
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_patterns_match_paths() -> None:
    """Frozen parameters do not change and have no optimizer state."""
    made = experiment('trainer.models.mlp_nnx:MLP', optimizer__freeze=('dense/0/.*',))
    trainer = Trainer(made)
    before = jax.tree.map(np.asarray, trainer.init_state().params)
    _, state = train(trainer, trainer.init_state())
    assert np.array_equal(before['dense']['0']['kernel'], state.params['dense']['0']['kernel'])
    assert not np.array_equal(before['dense']['1']['kernel'], state.params['dense']['1']['kernel'])
    assert not any(x.shape == (784, 64) for x in jax.tree.leaves(state.opt_state))


@pytest.mark.slow
def test_the_trained_module_is_returned() -> None:
    """As the user's class, in evaluation mode; works with `jax.jit` and `nnx.state`."""
    options = {'model__batch_norm': True, 'model__dropout_rate': 0.5}
    made = experiment(
        'trainer.models.mlp_nnx:MLP', evals=EVALS, precision={'compute': 'bfloat16'}, **options
    )
    trainer = Trainer(made)
    _, state = train(trainer, trainer.init_state())
    model = trainer.model(state)
    x = jax.random.uniform(jax.random.key(0), (8, 784))
    exact = experiment('trainer.models.mlp_nnx:MLP', **options).model
    expected = exact.bind(state.variables, Keys(seed=0, mode='eval'))(x)
    assert np.array_equal(model(x), expected)
    jitted = jax.jit(lambda model, x: model(x))(model, x)
    np.testing.assert_allclose(jitted, expected, rtol=1e-2, atol=1e-2)
    assert np.array_equal(model.dense[0].kernel[...], state.params['dense']['0']['kernel'])
    filters: dict[Any, int] = {
        nnx.BatchStat: 2,
        nnx.Not(nnx.Any(nnx.Param, nnx.RngState)): 2,
        nnx.All(nnx.Param, nnx.PathContains('norm')): 2,
        (lambda path, value: path[-1] == 'kernel'): 2,
    }
    for chosen, leaves in filters.items():
        assert len(jax.tree.leaves(nnx.state(model, chosen))) == leaves


def test_errors_equal_those_for_linen() -> None:
    with pytest.raises(
        UserError,
        match=r'Unknown key config\.model\.featurs\. Did you mean config\.model\.features\?',
    ):
        experiment('trainer.models.cnn_nnx:CNN', model__featurs=(8, 16))
    with pytest.raises(UserError, match=r'model\.rngs: remove it; .* from config\.seed'):
        experiment('trainer.models.cnn_nnx:CNN', model__rngs=3)
    with pytest.raises(UserError, match='got a function that returns int'):
        init(lambda rngs: 3)
    with pytest.raises(TypeError, match=r'expected a module of flax\.linen or flax\.nnx, got int'):
        as_functional(3)
