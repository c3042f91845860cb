# SPDX-License-Identifier: Apache-2.0
"""The train state: `apply_gradients`, and every field through a checkpoint."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.command import ROOT
from trainer.experiment import load_and_build
from trainer.step.state import TrainState
from trainer.trainer import Trainer


def state_of(tx: optax.GradientTransformation) -> TrainState:
    params = {'kernel': jnp.arange(6.0).reshape(2, 3), 'bias': jnp.ones(3)}
    return TrainState(
        step=jnp.int32(4),
        params=params,
        opt_state=tx.init(params),
        collections={'batch_stats': {'mean': jnp.zeros(3)}, 'other': {'count': jnp.int32(1)}},
        metrics=None,
    )


def test_apply_gradients_replaces_everything_at_once() -> None:
    """Parameters, optimizer state, step + 1 and the statistics, through a donating jit."""
    tx = optax.sgd(0.5, momentum=0.9)
    update = jax.jit(
        lambda state, grads, mean: state.apply_gradients(
            grads=grads, tx=tx, batch_stats={'mean': mean}, ema=grads
        ),
        donate_argnums=0,
    )
    before, start = jax.device_get(state_of(tx)), state_of(tx)
    grads = jax.tree.map(jnp.ones_like, before.params)
    after = update(start, grads, jnp.full(3, 7.0))
    assert start.step.is_deleted()
    assert (int(before.step), int(after.step)) == (4, 5)
    for name, value in before.params.items():
        np.testing.assert_array_equal(after.params[name], value - 0.5)
        np.testing.assert_array_equal(after.opt_state[0].trace[name], np.ones_like(value))
    np.testing.assert_array_equal(after.collections['batch_stats']['mean'], np.full(3, 7.0))
    assert int(after.collections['other']['count']) == 1
    assert after.ema.keys() == after.params.keys()
    again = update(after, grads, jnp.zeros(3))
    np.testing.assert_allclose(again.params['bias'], 1 - 0.5 - 0.5 * 1.9)


class Walker(nn.Module):
    """A model with a random key and statistics among its variables."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        key = self.variable('walk', 'key', jax.random.key, 5)
        if train:
            key.value = jax.random.split(key.value)[0]
        x = nn.Dense(16)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(nn.BatchNorm(use_running_average=not train)(x))


def test_every_field_is_saved_and_restored(tmp_path: pathlib.Path) -> None:
    """Statistics, a typed key, metrics, the average of the parameters, the loss scale."""

    def trainer() -> Trainer:
        experiment = load_and_build(
            str(ROOT / 'configs' / 'mnist_mlp.py'),
            model={'target': f'{__name__}:Walker'},
            train_for='3 steps',
            log__every='never',
            evals={},
            ema={'decay': 0.9},
            precision={'loss_scale': 8.0},
            checkpoint__every='never',
        )
        return Trainer(experiment, tmp_path)

    first = trainer()
    saved = first.fit().state.durable
    restored = trainer().restore('latest')
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, raw(restored), raw(saved))
    start = first.init_state()
    for field in ('params', 'opt_state', 'collections', 'metrics', 'ema', 'loss_scale'):
        changed = jax.tree.map(
            lambda a, b: not np.array_equal(a, b), *(raw(getattr(s, field)) for s in (start, saved))
        )
        assert any(jax.tree.leaves(changed)), field
    assert saved.collections['walk']['key'] != start.collections['walk']['key']
    assert float(restored.loss_scale.scale) == 8.0
    assert int(restored.step) == 3


def raw(tree: Any) -> Any:
    """Returns random keys as their numbers."""

    def numbers(x: Any) -> Any:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(numbers, tree)
