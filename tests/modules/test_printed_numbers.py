# SPDX-License-Identifier: Apache-2.0
"""Numbers printed in Flax's documentation, with the random number generator of that time.

They were drawn with `jax_threefry_partitionable=False`. Where the documentation trains, the tests
train with the trainer's own step, on the same data and initial parameters.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training import train_state

from trainer.config.loading import LoadedConfig
from trainer.data.sources import ArraySource
from trainer.experiment import build
from trainer.tasks import TaskOutput
from trainer.trainer import Trainer
from trainer.weights import restore

# With or without fused multiply-add, outputs of layers differ by up to the float32 spacing of their
# terms, which are below 1.
ROUNDING = 1e-7


@pytest.fixture(autouse=True)
def legacy_random_numbers() -> Iterator[None]:
    with jax.threefry_partitionable(False):
        yield


def regression() -> tuple[Any, Any, Any, Any]:
    """Returns W (10, 5), b (5,), x (20, 10) and y (20, 5) of the linear regression."""
    k1, k2 = jax.random.split(jax.random.PRNGKey(0))
    w, b = jax.random.normal(k1, (10, 5)), jax.random.normal(k2, (5,))
    key_sample, key_noise = jax.random.split(k1)
    x = jax.random.normal(key_sample, (20, 10))
    return w, b, x, x @ w + b + 0.1 * jax.random.normal(key_noise, (20, 5))


class Samples(ArraySource):
    """The twenty examples, as a data source."""

    def __init__(self) -> None:
        with jax.threefry_partitionable(False):  # The flag is local to a thread.
            _, _, x, y = regression()
        super().__init__({'x': np.asarray(x), 'y': np.asarray(y)})


def half_square(model: Any, batch: Any) -> TaskOutput:
    """Half the squared distance of each sample, as in the documentation."""
    error = batch['y'] - model(batch['x'])
    return TaskOutput(loss=(error**2).sum(-1) / 2)


def trainer_of(
    task: str, source: str, model: Any, optimizer: Any, *, steps: int, rows: int, cut: int
) -> Trainer:
    """Returns the trainer of a task and a source of this file, on this number of devices."""
    config = ml_collections.ConfigDict()
    config.train_for = f'{steps} steps'
    config.model, config.optimizer = model, optimizer
    config.task = {'ref': f'{__name__}:{task}'}
    config.data = {'source': {'target': f'{__name__}:{source}'}, 'batch_size': rows}
    config.mesh = {'data': cut, 'model': -1}
    path = pathlib.Path(__file__)
    return Trainer(build(LoadedConfig(config=config, name=path.stem, arg='', path=path)))


def losses(params: Any, steps: int, optimizer: dict[str, Any]) -> tuple[list[float], Any]:
    """Returns the loss before each step of the trainer on all samples, and the last parameters."""
    model = {'target': 'flax.linen:Dense', 'features': 5}
    trainer = trainer_of('half_square', 'Samples', model, optimizer, steps=steps, rows=20, cut=4)
    state = dataclasses.replace(trainer.init_state(), params=jax.tree.map(jnp.array, params))
    state = jax.device_put(
        state, jax.tree.map(lambda x: x.sharding, trainer.set_up().programs.abstract)
    )
    found = []
    with trainer.batches(0, [1] * steps) as batches:
        for batch in batches:
            state = trainer.set_up().programs.step(state, batch.arrays)
            found.append(float(state.metrics['task'].loss.compute()))
            # Digits would be lost in a sum.
            state = dataclasses.replace(state, metrics=trainer.set_up().programs.empty_metrics())
    return found, state.params


GRADIENT_DESCENT = {'target': 'optax:sgd', 'learning_rate': 0.3}


def test_keys_and_numbers() -> None:
    """The keys and normal numbers printed in "JAX for the impatient"."""
    key = jax.random.PRNGKey(0)
    assert float(jax.random.normal(key, (1,))[0]) == pytest.approx(-0.20584226, rel=1e-7)
    key, subkey = jax.random.split(key)
    assert key.tolist() == [4146024105, 967050713]
    assert subkey.tolist() == [2718843009, 1272950319]
    assert float(jax.random.normal(key, (1,))[0]) == pytest.approx(0.14389051, rel=1e-6)
    assert float(jax.random.normal(subkey, (1,))[0]) == pytest.approx(-1.2515389, rel=1e-6)
    assert jax.random.split(key, 4).tolist() == [
        [3306097435, 3899823266],
        [147607341, 367236428],
        [2280136339, 1907318301],
        [781391491, 1939998335],
    ]


def test_a_dense_layer() -> None:
    """Flax Basics: the first forward pass."""
    key1, key2 = jax.random.split(jax.random.PRNGKey(0))
    x = jax.random.normal(key1, (10,))
    model = nn.Dense(features=5)
    found = model.apply(model.init(key2, x), x)
    expected = [-1.3721193, 0.61131495, 0.6442836, 2.2192965, -1.1271116]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def square() -> tuple[jax.Array, jax.Array]:
    """Returns the key for parameters and the input (4, 4) of "Module basics"."""
    key1, key2 = jax.random.split(jax.random.PRNGKey(0))
    return key2, jax.random.uniform(key1, (4, 4))


class ExplicitMLP(nn.Module):
    """The first module of Flax Basics, with `setup`."""

    features: tuple[int, ...]

    def setup(self) -> None:
        self.layers = [nn.Dense(width) for width in self.features]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


class SimpleMLP(nn.Module):
    """The same in one compact method."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index, width in enumerate(self.features):
            x = nn.Dense(width, name=f'layers_{index}')(x)
            x = nn.relu(x) if index < len(self.features) - 1 else x
        return x


@pytest.mark.parametrize('form', [ExplicitMLP, SimpleMLP])
def test_a_perceptron(form: Any) -> None:
    """Flax Basics prints the same output for both ways to declare it."""
    key, x = square()
    found, variables = form((3, 4, 5)).init_with_output(key, x)
    shapes = {
        name: (layer['kernel'].shape, layer['bias'].shape)
        for name, layer in variables['params'].items()
    }
    assert shapes == {
        'layers_0': ((4, 3), (3,)), 'layers_1': ((3, 4), (4,)), 'layers_2': ((4, 5), (5,)),
    }  # fmt: skip
    expected = np.zeros((4, 5))
    expected[1] = [0.0072379, -0.00810347, -0.02550939, 0.02151716, -0.01261241]
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)


class SimpleDense(nn.Module):
    """The guide's own dense layer."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal()
        kernel = self.param('kernel', init, (x.shape[-1], self.features))
        return x @ kernel + self.param('bias', nn.initializers.zeros_init(), (self.features,))


def test_parameters_of_a_module() -> None:
    """Flax Basics, "Module parameters": initial parameters and output."""
    key, x = square()
    found, variables = SimpleDense(3).init_with_output(key, x)
    kernel = [
        [0.61506, -0.22728713, 0.6054702],
        [-0.29617992, 1.1232013, -0.879759],
        [-0.35162622, 0.3806491, 0.6893246],
        [-0.1151355, 0.04567898, -1.091212],
    ]
    output = [
        [-0.02996204, 1.102088, -0.6660265],
        [-0.31092793, 0.6323942, -0.53678817],
        [0.01424007, 0.9424717, -0.6356147],
        [0.36818963, 0.3586519, -0.00459214],
    ]
    np.testing.assert_allclose(variables['params']['kernel'], kernel, rtol=2e-7)
    assert variables['params']['bias'].tolist() == [0.0] * 3
    np.testing.assert_allclose(found, output, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.slow
def test_the_checkpoint_guide(tmp_path: pathlib.Path) -> None:
    """Its array and its layer after one step of SGD, before and after a checkpoint."""
    key1, key2 = jax.random.split(jax.random.PRNGKey(0))
    x = jax.random.normal(key1, (5,))
    params = nn.Dense(3).init(key2, x)['params']
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.001))
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    config = {'dimensions': np.array([5, 3]), 'name': 'dense'}
    tree = {'model': state, 'config': config, 'data': [x]}
    ocp.PyTreeCheckpointer().save(tmp_path / 'single_save', tree)
    kernel = [
        [0.26048955, -0.61399287, -0.23458514],
        [0.11050402, -0.8765793, 0.9800635],
        [0.36260957, 0.18276349, -0.6856061],
        [-0.8519373, -0.6416717, -0.4818122],
        [-0.6886102, -0.33987316, -0.05898903],
    ]
    printed = [0.59902626, 0.2172144, 2.4202902, 0.03266738, 1.2164948]
    for found in (tree, restore.raw(tmp_path / 'single_save')):
        model = found['model']
        model = model if isinstance(model, dict) else vars(model)
        assert model['step'] == 1
        np.testing.assert_allclose(model['params']['kernel'], kernel, rtol=2e-7)
        np.testing.assert_allclose(model['params']['bias'], [-0.001] * 3, rtol=1e-6)
        np.testing.assert_allclose(found['data'][0], printed, rtol=2e-7)
        assert found['config']['name'] == 'dense'
        assert found['config']['dimensions'].tolist() == [5, 3]


def test_the_true_parameters() -> None:
    """Their loss is not 0, because of the noise."""
    w, b, x, y = regression()
    loss = ((y - x @ w - b) ** 2).sum(-1).mean() / 2
    assert float(loss) == pytest.approx(0.023639796, rel=1e-6)


@pytest.mark.slow
def test_a_hundred_and_one_steps_from_zeros() -> None:
    """Linear regression of "JAX for the impatient"."""
    zeros = {'kernel': np.zeros((10, 5), 'f4'), 'bias': np.zeros(5, 'f4')}
    found, params = losses(zeros, 202, GRADIENT_DESCENT)
    # There the loss after step i is printed; here it is the one before the step behind it.
    printed = [
        10.97141, 1.0798324, 0.37958246, 0.1785529, 0.094415195, 0.054522216, 0.034489233,
        0.024058014, 0.01848086, 0.015438673, 0.0137539385, 0.012810305, 0.012277299, 0.011974387,
        0.011801453, 0.011702402, 0.011645538, 0.011612832, 0.011594019, 0.011583149, 0.011576906,
    ]  # fmt: skip
    assert found[1:102:5] == pytest.approx(printed, rel=1e-5)
    later = [
        0.011576906, 0.011573282, 0.011571203, 0.011570008, 0.011569307, 0.011568909, 0.0115686795,
        0.011568547, 0.011568466, 0.011568422, 0.011568392, 0.011568382, 0.011568381, 0.011568381,
        0.011568359, 0.01156837, 0.011568364, 0.01156837, 0.011568367, 0.011568364, 0.011568364,
    ]  # fmt: skip
    assert found[101::5] == pytest.approx(later, rel=1e-5)
    _, _, x, y = regression()
    best = np.linalg.lstsq(np.c_[x, np.ones(20)], np.asarray(y), rcond=None)[0]
    np.testing.assert_allclose(params['kernel'], best[:10], atol=2e-4)


@pytest.mark.slow
def test_gradient_descent_and_adam_on_a_dense_layer() -> None:
    """Flax Basics, from the layer's initial parameters; Adam continues from there."""
    key1, key2 = jax.random.split(jax.random.PRNGKey(0))
    first = nn.Dense(5).init(key2, jax.random.normal(key1, (10,)))['params']
    found, params = losses(first, 101, GRADIENT_DESCENT)
    printed = [
        35.343872, 0.5143469, 0.11384161, 0.039326727, 0.019916186, 0.014209134,
        0.012425641, 0.011850389, 0.011661778, 0.011599404, 0.011578696,
    ]  # fmt: skip
    assert found[::10] == pytest.approx(printed, rel=1e-5)
    adam = {'target': 'optax:adam', 'learning_rate': 0.3}
    found, _ = losses(params, 101, adam)
    printed = [
        0.011577619, 0.26143155, 0.07675066, 0.036440928, 0.022013078, 0.01617866,
        0.013002755, 0.012026124, 0.011764515, 0.011646035, 0.011585519,
    ]  # fmt: skip
    # Adam divides by the root of very small numbers here, which loses a digit or two.
    assert found[::10] == pytest.approx(printed, rel=1e-4)


class BiasAdderWithRunningMean(nn.Module):
    """The toy module of Flax Basics: subtracts a running mean of its inputs, and adds a bias."""

    decay: float = 0.99

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        is_initialized = self.has_variable('running', 'mean')
        mean = self.variable('running', 'mean', jnp.zeros, x.shape[1:])
        bias = self.param('bias', nn.initializers.zeros, x.shape[1:])
        if is_initialized:
            mean.value = self.decay * mean.value + (1 - self.decay) * x.mean(axis=0)
        return x - mean.value + bias


class Ones(ArraySource):
    """Ten examples of five ones."""

    def __init__(self) -> None:
        super().__init__({'x': np.ones((10, 5), 'f4')})


def squares(model: Any, batch: Any) -> TaskOutput:
    return TaskOutput(loss=((batch['x'] - model(batch['x'])) ** 2).sum(-1))


def test_a_running_mean() -> None:
    """By hand for 1, 2, 3, and in the trainer; in a custom collection."""
    model = BiasAdderWithRunningMean()
    variables = model.init(jax.random.PRNGKey(0), jnp.ones((10, 5)))
    for value, mean in ((1.0, 0.01), (2.0, 0.0299), (3.0, 0.059601)):
        _, new = model.apply(variables, value * jnp.ones((10, 5)), mutable=['running'])
        variables = {**variables, **new}
        np.testing.assert_allclose(variables['running']['mean'], np.full(5, mean), rtol=1e-5)
    sgd = {'target': 'optax:sgd', 'learning_rate': 0.02}
    toy = {'target': f'{__name__}:BiasAdderWithRunningMean'}
    trainer = trainer_of('squares', 'Ones', toy, sgd, steps=3, rows=10, cut=2)
    state, means = trainer.init_state(), []
    assert state.collections['running']['mean'].tolist() == [0.0] * 5
    with trainer.batches(0, [1] * 3) as batches:
        for batch in batches:
            state = trainer.set_up().programs.step(state, batch.arrays)
            means.append(float(state.collections['running']['mean'][0]))
    assert means == pytest.approx([0.01, 0.0199, 0.029701], rel=1e-5)


def test_current_random_numbers_differ() -> None:
    """So no other test may compare with these numbers."""
    with jax.threefry_partitionable(True):
        key = jax.random.PRNGKey(0)
        assert float(jax.random.normal(key, (1,))[0]) == pytest.approx(1.6226422, rel=1e-6)
