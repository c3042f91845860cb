# SPDX-License-Identifier: Apache-2.0
"""The guide to batch normalisation: where statistics are, over which rows, and when they move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors, jax_utils

from trainer.modules import functional
from trainer.parallel.mesh import make_mesh
from trainer.step.optimizer import Optimizer
from trainer.step.precision import AS_IS, Precision
from trainer.step.program import Programs
from trainer.step.state import TrainState
from trainer.step.task_runner import TaskRunner
from trainer.step.train_step import TrainStep

DEVICES = jax.local_device_count()


class MLP(nn.Module):
    """The guide's, which is told whether it trains."""

    momentum: float = 0.99
    axis_name: str | None = None
    groups: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(features=4)(x)
        x = nn.BatchNorm(
            use_running_average=not train, momentum=self.momentum, axis_name=self.axis_name,
            axis_index_groups=self.groups,
        )(x)  # fmt: skip
        return nn.Dense(features=1)(nn.relu(x))


def rows(count: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 2.0, (count, 3)).astype('f4')


def square(model: Callable[..., Any], batch: Any) -> jax.Array:
    return model(batch['x'])[:, 0] ** 2


def programs(model: nn.Module, mesh: Any = None, precision: Precision = AS_IS) -> Programs:
    step = TrainStep(
        model=functional(model, precision), task=TaskRunner.of(square),
        optimizer=Optimizer(base=optax.sgd(0.1)), seed=0,
    )  # fmt: skip
    spec = {'x': jax.ShapeDtypeStruct((16, 3), np.float32)}
    return Programs(step, spec, mesh or make_mesh({'data': -1}))


def test_it_adds_four_variables() -> None:
    """C2: mean and var among the statistics, scale and bias among the parameters."""
    state = programs(MLP()).abstract
    shapes = jax.tree.map(lambda x: x.shape, {**state.variables})
    assert shapes == {
        'batch_stats': {'BatchNorm_0': {'mean': (4,), 'var': (4,)}},
        'params': {
            'BatchNorm_0': {'bias': (4,), 'scale': (4,)},
            'Dense_0': {'bias': (4,), 'kernel': (3, 4)},
            'Dense_1': {'bias': (1,), 'kernel': (4, 1)},
        },
    }


def test_the_first_statistics_are_of_no_batch() -> None:
    """C6: making the state moves nothing, and needs no axis of the name that training has."""
    state = programs(MLP(momentum=0.5)).init()
    statistics = state.collections['batch_stats']['BatchNorm_0']
    assert statistics['mean'].tolist() == [0.0] * 4
    assert statistics['var'].tolist() == [1.0] * 4
    variables = MLP(axis_name='batch').init(jax.random.key(0), rows(), train=False)
    assert variables['batch_stats']['BatchNorm_0']['var'].tolist() == [1.0] * 4


def test_training_and_evaluation_are_told_apart() -> None:
    """C1: `train` comes by itself; training uses the batch, evaluation what it has left."""
    program = programs(MLP(momentum=0.5))
    state = program.init()
    variables = jax.device_get(state.variables)
    batch = {'x': rows()}
    expected, moved = MLP(momentum=0.5).apply(
        variables, batch['x'], train=True, mutable=['batch_stats']
    )
    state = program.step(state, jax.device_put(batch, program.step.ready().input_shardings[0][1]))
    loss = state.metrics['task'].loss.compute()
    assert float(loss) == pytest.approx(float((expected**2).mean()), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        state.collections['batch_stats'], moved['batch_stats'],
    )  # fmt: skip


def test_the_momentum_of_a_constant() -> None:
    """C5: from mean 0 and variance 1 by a tenth of the way to those of twos."""
    norm = nn.BatchNorm(use_running_average=False, momentum=0.9)
    twos = jnp.full((8, 5), 2.0)
    variables = norm.init(jax.random.key(0), twos)
    _, new = norm.apply(variables, twos, mutable=['batch_stats'])
    np.testing.assert_allclose(new['batch_stats']['mean'], np.full(5, 0.2), rtol=1e-6)
    np.testing.assert_allclose(new['batch_stats']['var'], np.full(5, 0.9), rtol=1e-6)


def test_nothing_moves_where_nothing_may() -> None:
    """C4, C10, U9: training mode with `mutable=False` is an error, and not a mistake."""
    model = MLP()
    variables = model.init(jax.random.key(0), rows(), train=False)
    before = jax.device_get(variables)
    model.apply(variables, rows(), train=False, mutable=False)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    with pytest.raises(errors.ModifyScopeVariableError):
        model.apply(variables, rows(), train=True, mutable=False)


def on_devices(model: nn.Module, variables: Any, x: np.ndarray) -> tuple[Any, Any]:
    """Returns outputs and statistics of `pmap` with one slice of the rows on each device."""

    def run(variables: Any, x: jax.Array) -> Any:
        return model.apply(variables, x, train=True, mutable=['batch_stats'])

    sliced = x.reshape(DEVICES, -1, 3)
    return jax.pmap(run, axis_name='batch')(jax_utils.replicate(variables), sliced)


def test_statistics_over_devices() -> None:
    """C7: of a batch over eight devices, of `pmap` with an axis, of one device: the same."""
    x = rows()
    variables = MLP().init(jax.random.key(0), x, train=False)
    whole, moved = MLP().apply(variables, x, train=True, mutable=['batch_stats'])
    outputs, statistics = on_devices(MLP(axis_name='batch'), variables, x)
    np.testing.assert_allclose(outputs.reshape(-1, 1), whole, rtol=1e-4, atol=1e-5)
    assert not np.allclose(on_devices(MLP(), variables, x)[0].reshape(-1, 1), whole, atol=1e-3)
    program = programs(MLP(), make_mesh({'data': -1}))
    state: TrainState = program.init().replace(
        params=jax.device_put(variables['params'], program.abstract.step.sharding)
    )
    batch = jax.device_put({'x': x}, program.step.ready().input_shardings[0][1])
    state = program.step(state, batch)
    for found in (jax_utils.unreplicate(statistics), state.collections):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            found['batch_stats'], moved['batch_stats'],
        )  # fmt: skip


def test_statistics_of_groups_of_devices() -> None:
    """C7: `axis_index_groups` of one half each are those of half the batch."""
    x = rows()
    halves = [list(range(DEVICES // 2)), list(range(DEVICES // 2, DEVICES))]
    variables = MLP().init(jax.random.key(0), x, train=False)
    outputs, _ = on_devices(MLP(axis_name='batch', groups=halves), variables, x)
    alone = [
        MLP().apply(variables, half, train=True, mutable=['batch_stats'])[0]
        for half in np.split(x, 2)
    ]
    np.testing.assert_allclose(outputs.reshape(-1, 1), np.concatenate(alone), rtol=1e-4, atol=1e-5)


def test_statistics_under_vmap() -> None:
    """C7: an axis of `vmap` synchronises, too, and the statistics come out once."""
    x = rows()
    model = MLP(axis_name='batch')
    variables = MLP().init(jax.random.key(0), x, train=False)

    def one(x: jax.Array) -> Any:
        return model.apply(variables, x, train=True, mutable=['batch_stats'])

    outputs, moved = jax.vmap(one, axis_name='batch', out_axes=(0, None))(x)
    whole, expected = MLP().apply(variables, x, train=True, mutable=['batch_stats'])
    np.testing.assert_allclose(outputs, whole, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), moved, expected)


def test_statistics_are_kept_in_full() -> None:
    """C8: of a model that computes in bfloat16, too."""
    program = programs(MLP(), precision=Precision(compute='bfloat16'))
    state = program.init()
    batch = jax.device_put({'x': rows()}, program.step.ready().input_shardings[0][1])
    state = program.step(state, batch)
    assert {x.dtype for x in jax.tree.leaves(state.collections)} == {np.dtype('float32')}
    half = nn.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)
    variables = half.init(jax.random.key(0), jnp.ones((4, 3)))
    out, _ = half.apply(variables, jnp.ones((4, 3)), mutable=['batch_stats'])
    assert out.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype('float32')}
