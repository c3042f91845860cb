# SPDX-License-Identifier: Apache-2.0
"""Optimizers of half-precision parameters work in float32; integer parameters are rejected."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.marks import slow_after
from tests.step import tiny
from trainer.config.errors import UserError
from trainer.step.optimizer import Optimizer
from trainer.step.state import TrainState

SGD = {'target': 'optax:sgd', 'learning_rate': 0.1, 'momentum': 0.9}
ADAM = {'target': 'optax:adam', 'learning_rate': 0.01}
HALVES = ('float16', 'bfloat16')

OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'adam': (ADAM, {}),
    'adamw': ({**ADAM, 'target': 'optax:adamw', 'decay_mask': '.*/kernel'}, {}),
    'clipped': ({**ADAM, 'clip_norm': 0.5}, {}),
    'frozen': ({**ADAM, 'freeze': 'Dense_0/bias'}, {}),
    'multiplied': ({**ADAM, 'lr_multipliers': (('.*', 2.0),)}, {}),
    'groups': (
        {'groups': {'a': {**ADAM, 'params': '.*/kernel'}, 'b': {**SGD, 'params': '.*/bias'}}},
        {},
    ),
    'MultiSteps': ({'target': 'optax:MultiSteps', 'opt': ADAM, 'every_k_schedule': 2}, {}),
    'lamb': ({'target': 'optax:lamb', 'learning_rate': 0.01}, {}),
    'adafactor': ({'target': 'optax:adafactor', 'learning_rate': 0.02}, {}),
    'micro-batches': (ADAM, {'accumulate': 4}),
    'average': (ADAM, {'ema': {'decay': 0.5}}),
    'members': (
        ADAM,
        {'ensemble': {'size': 2, 'vary': {'optimizer': {'learning_rate': (0.01, 0.02)}}}},
    ),
}


@pytest.mark.parametrize(
    ('name', 'dtype'),
    slow_after(1, [*((name, 'float16') for name in OPTIMIZERS), ('adam', 'bfloat16')]),
)
def test_optimizers_train_half_precision_parameters(name: str, dtype: str) -> None:
    """Adam's eps of 1e-8 is 0 in float16: for a zero gradient, the update would be NaN."""
    optimizer, options = OPTIMIZERS[name]
    made = tiny.trainer(
        optimizer=optimizer,
        precision={'params': dtype, 'compute': dtype},
        train_for='60 steps',
        log={'every': '20 steps'},
        evals={},
        **options,
    )
    first = dict(made.fit(max_steps=20).metrics)
    result = made.fit()
    state = result.state
    assert result.metrics['train/loss'] < 0.7 * first['train/loss']
    if dtype == 'float16':
        assert result.metrics['train/skipped_updates'] <= 5
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
    kept = [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert kept and {x.dtype for x in kept} == {jnp.dtype('float32')}
    assert made.set_up().programs.step.compiles == 1


def test_slots_are_sharded_like_their_parameters() -> None:
    rule = {'target': 'trainer.sharding:FSDP', 'min_bytes': 1}
    made = tiny.trainer(
        optimizer=ADAM, precision={'params': 'bfloat16'}, sharding=rule,
        mesh={'data': 2, 'fsdp': 4},
    )  # fmt: skip
    abstract = made.set_up().programs.abstract
    for slots in (abstract.opt_state[0].mu, abstract.opt_state[0].nu):
        kernel = slots['Dense_1']['kernel']
        assert kernel.dtype == jnp.float32
        assert kernel.sharding == abstract.params['Dense_1']['kernel'].sharding
        assert not kernel.sharding.is_fully_replicated


@pytest.mark.parametrize('dtype', HALVES)
def test_update_is_computed_in_float32_and_rounded_once(dtype: str) -> None:
    """Moments, norms and schedules equal those of float32 copies of parameters and gradients."""
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=(5, 3)), dtype) for k in ('a', 'b')}
    grads = [{k: jnp.asarray(rng.normal(size=(5, 3)), dtype) for k in params} for _ in range(4)]
    optimizer = Optimizer(base=optax.adamw(3e-4), clip_norm=0.3)
    tx = optimizer.transformation(params)
    full = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    reference = optimizer.transformation(full)
    state, other = tx.init(params), reference.init(full)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype('float32')}
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (grad, params))
        expected, other = reference.update(wide[0], other, wide[1])
        params = optax.apply_updates(params, updates)
        for name, x in params.items():
            rounded = (wide[1][name] + expected[name]).astype(dtype)
            np.testing.assert_array_equal(np.float32(x), np.float32(rounded))
    jax.tree.map(np.testing.assert_array_equal, state, other)


@pytest.mark.parametrize('accumulate', slow_after(1, [1, 4]))
def test_small_gradients_of_float16_survive_the_loss_scale(accumulate: int) -> None:
    """They would underflow if they were unscaled in float16."""
    made = tiny.trainer(
        model={'target': f'{__name__}:Faint'}, task={'ref': f'{__name__}:faint'}, evals={},
        precision={'params': 'float16', 'compute': 'float16', 'loss_scale': 2.0**14},
        optimizer={'target': 'optax:sgd', 'learning_rate': 1e7}, train_for='1 steps',
        accumulate=accumulate,
    )  # fmt: skip
    state = made.fit().state
    # The gradient is 2e-8, which float16 rounds to 0 or 6e-8.
    np.testing.assert_allclose(np.float32(state.params['w']), 1 - 0.2, rtol=2e-3)


class Faint(nn.Module):
    """A model with a parameter of little influence."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.param('w', lambda key: jnp.ones(())) * jnp.ones(len(x), x.dtype)


def faint(model: Any, batch: Any) -> jax.Array:
    return 2e-8 * model(batch['x']).astype(jnp.float32)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_checkpoint_with_half_precision_slots_is_explained(tmp_path: pathlib.Path) -> None:
    options: dict[str, Any] = {'optimizer': ADAM, 'precision': {'params': 'bfloat16'}}
    made = tiny.trainer(tmp_path / 'old', **options)
    state: TrainState = made.fit(max_steps=5).state

    def halve(x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x

    halved = jax.tree.map(halve, state.opt_state)
    old = state.replace(opt_state=halved, step=jnp.int32(7))  # type: ignore[attr-defined]
    assert made.checkpoints is not None
    made.checkpoints.save(7, old, {**made.checkpoints.meta(5), 'step': 7})
    made.checkpoints.close()
    with pytest.raises(UserError) as error:
        tiny.trainer(tmp_path / 'old', **options).fit()
    text = str(error.value)
    assert 'opt_state/0/mu/Dense_0/kernel: bfloat16[16, 4] in the checkpoint, float32' in text
    assert 'The optimizer state of half-precision parameters is now kept in float32.' in text
    # The advice in the message works.
    source = {'path': str(tmp_path / 'old'), 'step': 7, 'optimizer': True}
    assert f'config.init_from=dict(path={source["path"]!r}, step=7, optimizer=True)' in text
    start = tiny.trainer(init_from=source, **options).init_state()
    mu = start.opt_state[0].mu['Dense_1']['kernel']
    assert mu.dtype == jnp.float32
    np.testing.assert_array_equal(mu, np.float32(old.opt_state[0].mu['Dense_1']['kernel']))


class Ordered(nn.Module):
    """A model with a permutation and a flag among its parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        order = self.param('order', lambda key: jnp.arange(8, dtype=jnp.int32))
        flag = self.param('flag', lambda key: jnp.ones((), bool))
        return nn.Dense(4)(jnp.where(flag, x[:, order], x))


class NNXOrdered(nnx.Module):
    """The same for NNX, in an `nnx.Param`."""

    def __init__(self, rngs: nnx.Rngs):
        self.order = nnx.Param(jnp.arange(8, dtype=jnp.int32))
        self.dense = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x[:, self.order[...]])


class Apart(nn.Module):
    """The permutation in a collection, as the message suggests."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        order = self.variable('constants', 'order', lambda: jnp.arange(8, dtype=jnp.int32))
        return nn.Dense(4)(x[:, order.value])


class Texts(nn.Module):
    """A model with a string and a Python number among its variables."""

    text: Any = 'v1'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.variable('notes', 'version', lambda: self.text)
        self.variable('notes', 'count', lambda: 2)
        return nn.Dense(4)(x)


def test_variables_that_are_not_arrays_are_rejected() -> None:
    with pytest.raises(UserError, match=r'the model has notes/version \(str\) among its variables'):
        tiny.trainer(model={'target': f'{__name__}:Texts'}).compile()
    tiny.trainer(model={'target': f'{__name__}:Texts', 'text': 1.5}).compile()


@pytest.mark.parametrize('freeze', [None, 'order'])
@pytest.mark.parametrize('name', ['Ordered', 'NNXOrdered'])
def test_integer_parameters_are_rejected(name: str, freeze: str | None) -> None:
    model = {'target': f'{__name__}:{name}'}
    with pytest.raises(UserError, match=r'order \(int32\).*Use another collection') as error:
        tiny.trainer(model=model, optimizer={**SGD, 'freeze': freeze}).compile()
    assert ('flag (bool)' in str(error.value)) == (name == 'Ordered')
    assert 'config.optimizer.freeze' in str(error.value)


@pytest.mark.slow
def test_integers_in_another_collection_are_kept() -> None:
    state = tiny.trainer(model={'target': f'{__name__}:Apart'}).fit().state
    np.testing.assert_array_equal(state.collections['constants']['order'], np.arange(8))
