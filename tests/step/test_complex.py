# SPDX-License-Identifier: Apache-2.0
"""Complex parameters are optimized correctly, and norms include imaginary parts."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import command
from tests.marks import slow_after
from tests.step import tiny
from trainer.config.errors import UserError
from trainer.modules.precision import Precision
from trainer.step import step_metrics as norms
from trainer.step.optimizer import Optimizer, RegexMask
from trainer.tasks import TaskOutput
from trainer.weights import safetensors

GOAL = np.asarray([1 - 2j, -0.5 + 1j, 3j], np.complex64)
START = np.full(3, 0.5 + 0.5j, np.complex64)
SGD = {'target': 'optax:sgd', 'learning_rate': 0.1}


class Complex(nn.Module):
    """Distances of a complex and a real parameter from their targets."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = self.param('z', lambda key: jnp.asarray(START))
        w = self.param('w', lambda key: jnp.float32(1.0))
        ones = jnp.ones(x.shape[0])
        return (jnp.abs(z - GOAL) ** 2).sum() * ones, (w - 3.0) ** 2 * ones


def distance(model: Any, batch: Any) -> jax.Array:
    return sum(model(batch['x']))  # type: ignore[no-any-return]


def distances(model: Any, batch: Any) -> TaskOutput:
    z, w = model(batch['x'])
    return TaskOutput(loss={'z': z, 'w': w})


def step_by_parts(state: Any, batch: Any, ctx: Any) -> Any:
    """A custom step from the parts of the default step."""
    grads, collections, metrics = ctx.gradients(state, batch)
    updates, opt_state = ctx.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(params=params, opt_state=opt_state, collections=collections), metrics


OPTIONS: dict[str, dict[str, Any]] = {
    'sgd': {},
    'micro-batches': {'accumulate': 4},
    'loss scale': {'precision': {'loss_scale': 1024.0}},
    'bfloat16': {'precision': {'compute': 'bfloat16'}},
    'groups': {'optimizer': {'groups': {'a': {**SGD, 'params': 'z'}, 'b': {**SGD, 'params': 'w'}}}},
    'named losses': {
        'task': {'ref': f'{__name__}:distances'},
        'optimizer': {
            'groups': {
                'a': {**SGD, 'params': 'z', 'loss': 'z'},
                'b': {**SGD, 'params': 'w', 'loss': 'w'},
            }
        },
    },
    'named losses in micro-batches': {
        'task': {'ref': f'{__name__}:distances'},
        'accumulate': 2,
        'optimizer': {
            'groups': {
                'a': {**SGD, 'params': 'z', 'loss': 'z'},
                'b': {**SGD, 'params': 'w', 'loss': 'w'},
            }
        },
    },
    'custom step': {'step': {'ref': f'{__name__}:step_by_parts'}},
    'average': {'ema': {'decay': 0.5}},
    'ensemble': {'ensemble': {'size': 2}},
}


def trainer(workdir: pathlib.Path | None = None, **options: Any) -> Any:
    options.setdefault('task', {'ref': f'{__name__}:distance'})
    options = {'model': {'target': f'{__name__}:Complex'}, 'evals': {}, **options}
    return tiny.trainer(workdir, **options)


@pytest.mark.parametrize('name', slow_after(2, OPTIONS))
def test_complex_parameters_converge(name: str) -> None:
    """A step of 0.1 along the gradient of the squared distance leaves 0.8 of the distance."""
    state = jax.device_get(trainer(**OPTIONS[name]).fit().state)
    left = 0.8**20
    z, w = state.params['z'], state.params['w']
    assert z.dtype == np.complex64
    assert z.shape == ((2, 3) if name == 'ensemble' else (3,))
    np.testing.assert_allclose(z, np.broadcast_to(GOAL + left * (START - GOAL), z.shape), rtol=1e-5)
    np.testing.assert_allclose(w, 3 - 2 * left, rtol=0.01 if name == 'bfloat16' else 1e-5)
    if state.ema is not None:
        assert state.ema['z'].dtype == np.complex64
        assert np.abs(state.ema['z'] - z).max() < np.abs(START - GOAL).max() * left * 1.1


@pytest.mark.parametrize(
    'node',
    slow_after(1, [
        {'target': 'optax:adam', 'learning_rate': 0.05},
        {'target': 'optax:adamw', 'learning_rate': 0.05, 'weight_decay': 1.0, 'decay_mask': 'w'},
        {'target': 'optax:lion', 'learning_rate': 0.05},
        {'target': 'optax:rmsprop', 'learning_rate': 0.05, 'momentum': 0.5},
        {'target': 'optax:adafactor', 'learning_rate': 0.05},
        {'target': 'optax:MultiSteps', 'opt': SGD, 'every_k_schedule': 2},
        {
            'target': 'optax.contrib:schedule_free_adamw', 'learning_rate': 0.05,
            'eval_params': {'ref': 'optax.contrib:schedule_free_eval_params'},
        },
    ]),
    ids=lambda node: node['target'],
)  # fmt: skip
def test_optimizers_treat_a_complex_parameter_as_two_real_ones(node: dict[str, Any]) -> None:
    """The result equals that of real and imaginary parts as separate parameters."""
    clip = None if node['target'].endswith('MultiSteps') else 1.0
    made = trainer(optimizer={**node, 'clip_norm': clip}, train_for='40 steps')
    state = made.fit().state
    pairs = {'real': jnp.real(START), 'imag': jnp.imag(START), 'w': jnp.float32(1)}
    optimizer = made.experiment.optimizer
    tx = Optimizer(base=optimizer.base, clip_norm=clip).transformation(pairs)
    opt_state = tx.init(pairs)

    def loss(p: Any) -> jax.Array:
        square = (p['real'] - GOAL.real) ** 2 + (p['imag'] - GOAL.imag) ** 2
        return square.sum() + (p['w'] - 3.0) ** 2

    @jax.jit
    def step(p: Any, opt_state: Any) -> Any:
        updates, opt_state = tx.update(jax.grad(loss)(p), opt_state, p)
        return optax.apply_updates(p, updates), opt_state

    start = float(loss(pairs))
    for _ in range(40):
        pairs, opt_state = step(pairs, opt_state)
    assert float(loss(pairs)) < 0.5 * start
    # `atol`, because one of them crosses 0.
    np.testing.assert_allclose(state.params['z'].real, pairs['real'], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.params['z'].imag, pairs['imag'], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.params['w'], pairs['w'], rtol=1e-4)
    assert made.set_up().programs.step.compiles == 1
    if 'eval_params' in node:
        (free,) = (x for x in opt_state if hasattr(x, 'z'))
        point = optax.contrib.schedule_free_eval_params(free, pairs)
        found = made.eval_params(state)['z']
        np.testing.assert_allclose(found, point['real'] + 1j * point['imag'], rtol=1e-4)


@pytest.mark.slow
def test_slots_are_complex_and_sharded_like_the_parameter(tmp_path: pathlib.Path) -> None:
    """Slots have the parameter's path, shape and sharding, and `init_from` loads them."""
    adam = {'target': 'optax:adam', 'learning_rate': 0.05}
    cut = {'target': 'trainer.sharding:ByPath', 'rules': (('kernel', (None, 'fsdp')),)}
    options: dict[str, Any] = {
        'mesh': {'data': 2, 'fsdp': 4}, 'sharding': cut, 'optimizer': adam,
        'model': {'target': f'{__name__}:Kernel'}, 'task': {'ref': f'{__name__}:outputs'},
    }  # fmt: skip
    made = trainer(tmp_path / 'first', **options)
    state = made.fit(max_steps=10).state
    for slot in (state.opt_state[0].mu, state.opt_state[0].nu):
        assert slot['kernel'].dtype == jnp.complex64
        assert slot['kernel'].sharding == state.params['kernel'].sharding
        assert slot['kernel'].addressable_shards[0].data.shape == (8, 2)
    again = trainer(tmp_path / 'first', **options).fit(max_steps=1).state
    assert int(again.opt_state[0].count) == 11
    source = {'path': str(tmp_path / 'first'), 'step': 10, 'optimizer': True}
    start = trainer(init_from=source, **options).init_state()
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(start.opt_state[0]),
        jax.device_get(made.restore(10).opt_state[0]),
    )


def test_complex_weights_are_not_loaded_into_real_parameters(tmp_path: pathlib.Path) -> None:
    """A weights file stores complex numbers; loading one into a real parameter is an error."""
    held = {'params/z': GOAL, 'params/w': np.float32(2)}
    safetensors.write(tmp_path / 'complex.safetensors', held)
    read = safetensors.read(tmp_path / 'complex.safetensors')
    np.testing.assert_array_equal(read['params/z'], GOAL)
    params = trainer(init_from={'path': str(tmp_path / 'complex.safetensors')}).init_state().params
    np.testing.assert_array_equal(params['z'], GOAL)
    safetensors.write(tmp_path / 'other.safetensors', {**held, 'params/w': np.complex64(2 + 1j)})
    with pytest.raises(UserError, match=r'params/w: got complex64\[\], the model has float32\[\]'):
        trainer(init_from={'path': str(tmp_path / 'other.safetensors')}).init_state()


class Kernel(nn.Module):
    """A complex matrix."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param('kernel', lambda key: jnp.full((8, 8), 0.5 + 0.5j, jnp.complex64))
        return jnp.abs(x @ kernel)


def outputs(model: Any, batch: Any) -> jax.Array:
    return (model(batch['x']) ** 2).mean(-1)  # type: ignore[no-any-return]


def test_norms_use_absolute_values(tmp_path: pathlib.Path) -> None:
    """Norms of parameters, gradients and clipped updates."""
    made = trainer(
        tmp_path, optimizer={**SGD, 'clip_norm': 0.5}, train_for='1 steps', log={'every': '1 steps'}
    )
    state = made.fit().state
    (row,) = command.rows(tmp_path)
    gradient = np.sqrt((np.abs(2 * (START - GOAL)) ** 2).sum() + 4.0**2)
    assert row['train/grad_norm'] == pytest.approx(gradient, rel=1e-5)
    assert row['train/update_norm'] == pytest.approx(0.05, rel=1e-5)
    z, w = jax.device_get((state.params['z'], state.params['w']))
    assert row['train/param_norm'] == pytest.approx(np.sqrt((np.abs(z) ** 2).sum() + w**2))


@pytest.mark.parametrize('size', [5, norms._LARGE + 1])
def test_all_norm_computations_support_complex_numbers(size: int) -> None:
    x = {'z': jnp.full(size, 3 - 4j, jnp.complex64), 'x': jnp.full(2, 2.0)}
    step = dict(grads=x, updates=x, old=x, new=x, frozen={'z': False, 'x': False})
    expected = np.sqrt(25 * size + 8)
    replicated = {'z': True, 'x': True}
    for options in (
        {'due': None},
        {'due': None, 'replicated': replicated},
        {'due': jnp.bool_(True)},
    ):
        for value in norms.norms(**step, **options).values():
            assert float(value) == pytest.approx(expected, rel=1e-5)


def test_precision_does_not_cast_complex_numbers() -> None:
    tree = {'z': jnp.asarray(GOAL), 'x': jnp.ones(2)}
    halves = Precision(params='bfloat16', compute='float16', output='float16')
    for cast in (halves.cast_params, halves.cast_for_compute, halves.cast_output):
        made = cast(tree)
        np.testing.assert_array_equal(made['z'], GOAL)
        assert made['x'].dtype.itemsize == 2


def test_decay_mask_matches_complex_parameters_by_path() -> None:
    """Patterns are matched against the path of the parameter, not of its two parts."""
    params = {'z': jnp.asarray(GOAL), 'x': jnp.ones(2)}
    base = optax.adamw(0.1, weight_decay=0.5, mask=RegexMask(('z',)))
    tx = Optimizer(base=base).transformation(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates['z'], -0.05 * GOAL, rtol=1e-6)
    np.testing.assert_array_equal(updates['x'], 0)
