# SPDX-License-Identifier: Apache-2.0
"""Optimizer states of `flax.optim`, loaded into optimizers of optax."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

from tests.weights.examples import Net, assert_same, flatten, trainer
from trainer.config.errors import UserError


def adam_of_flax(grads: list[Any]) -> Any:
    """Returns the state of `flax.optim.Adam` after these gradients, and its last update."""
    m = v = jax.tree.map(np.zeros_like, grads[0])
    for grad in grads:
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grad)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grad)
    count = len(grads)
    step = jax.tree.map(
        lambda m, v: -0.01 * m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8), m, v
    )
    states = jax.tree.map(lambda m, v: {'grad_ema': m, 'grad_sq_ema': v}, m, v)
    return {'step': np.array(count), 'param_states': states}, step


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['flax', 'pre_linen'])
def test_adam_of_flax_optim(tmp_path: pathlib.Path, layout: str) -> None:
    """Adam continues in optax, under the names of Linen or of `flax.nn`."""
    rng = np.random.default_rng(0)
    variables = jax.device_get(Net().init(jax.random.key(3), jnp.ones((2, 8))))
    params, stats = variables['params'], variables['batch_stats']
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype('f4'), params) for _ in '1234']
    before = {'Dense_0': 'Dense_0', 'BatchNorm_0': 'BatchNorm_1', 'Dense_1': 'Dense_2'}

    def with_old_names(tree: Any) -> Any:
        if layout == 'flax':
            return tree
        backbone = {before[name]: x for name, x in tree['backbone'].items()}
        return {'params': {**tree, 'backbone': backbone}}

    state = adam_of_flax(grads[:3])[0]
    state['param_states'] = with_old_names(state['param_states'])
    stats = {f'/backbone/{before[k]}': x for k, x in stats['backbone'].items()} if (
        layout == 'pre_linen') else {'batch_stats': stats}  # fmt: skip
    old = {'optimizer': {'target': with_old_names(params), 'state': state}, 'model_state': stats}
    file = tmp_path / 'old.msgpack'
    file.write_bytes(serialization.msgpack_serialize(old))
    init_from = {'path': str(file), 'layout': layout, 'optimizer': True}
    new = trainer(tmp_path, init_from=init_from).init_state()
    assert_same(new.params, params)
    assert int(new.step) == 0 and int(new.opt_state[0].count) == 3
    update, _ = optax.adam(0.01).update(jax.tree.map(jnp.asarray, grads[3]), new.opt_state)
    expected = adam_of_flax(grads)[1]
    for path, x in flatten(update).items():
        np.testing.assert_allclose(x, flatten(expected)[path], rtol=1e-5, err_msg=path)


@pytest.mark.slow
def test_momentum_of_flax_optim(tmp_path: pathlib.Path) -> None:
    """Its momentum is the trace of `optax.sgd`, and is missing for Adam."""
    variables = jax.device_get(Net().init(jax.random.key(3), jnp.ones((2, 8))))
    states = jax.tree.map(lambda x: {'momentum': x + 1}, variables['params'])
    old = {'optimizer': {'target': variables['params'], 'state': {
        'step': np.array(5), 'param_states': states}},
        'model_state': {'batch_stats': variables['batch_stats']}}  # fmt: skip
    file = tmp_path / 'old.msgpack'
    file.write_bytes(serialization.msgpack_serialize(old))
    init_from = {'path': str(file), 'optimizer': True}
    sgd = {'target': 'optax:sgd', 'learning_rate': 0.1, 'momentum': 0.9}
    new = trainer(tmp_path, init_from=init_from, optimizer=sgd).init_state()
    assert_same(new.opt_state[0].trace, jax.tree.map(lambda x: x + 1, variables['params']))
    with pytest.raises(UserError, match=r'Missing:\n  opt_state\.0\.mu/'):
        trainer(tmp_path, init_from=init_from).init_state()
