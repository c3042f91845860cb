# SPDX-License-Identifier: Apache-2.0
"""The guide to batch normalization: location, examples and updates of the statistics."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors, jax_utils

from trainer.config.errors import UserError
from trainer.evaluate.step import EvalStep
from trainer.models.norm import GroupedBatchNorm
from trainer.models.resnet import ResNet
from trainer.modules.functional import as_functional
from trainer.modules.precision import AS_IS, Precision
from trainer.parallel.mesh import make_mesh
from trainer.step.context import StepContext
from trainer.step.one_model import TrainStep
from trainer.step.optimizer import Optimizer
from trainer.step.programs import Programs
from trainer.step.state import TrainState
from trainer.tasks.runner import MASK, TaskRunner

DEVICES = jax.local_device_count()


class MLP(nn.Module):
    """The guide's MLP, with a training flag in its call."""

    momentum: float = 0.99
    axis_name: str | None = None
    groups: Any = None
    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(features=4)(x)
        x = self.norm(
            use_running_average=not train, momentum=self.momentum, axis_name=self.axis_name,
            axis_index_groups=self.groups, name='BatchNorm_0',
        )(x)  # fmt: skip
        return nn.Dense(features=1)(nn.relu(x))


def rows(count: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 2.0, (count, 3)).astype('f4')


def square(model: Callable[..., Any], batch: Any) -> jax.Array:
    return model(batch['x'])[:, 0] ** 2


def programs(model: nn.Module, mesh: Any = None, precision: Precision = AS_IS) -> Programs:
    step = TrainStep(StepContext(
        model=as_functional(model, precision), task=TaskRunner.from_task(square),
        optimizer=Optimizer(base=optax.sgd(0.1)), seed=0
))  # fmt: skip
    spec = {'x': jax.ShapeDtypeStruct((16, 3), np.float32)}
    return Programs(step, spec, mesh or make_mesh({'data': -1}))


def run_step(program: Programs, batch: Any, variables: Any = None) -> TrainState:
    """Returns the state after one step on this batch, optionally from other variables."""
    state = program.init()
    if variables is not None:
        params = jax.tree.map(np.array, variables['params'])  # A copy: the step donates its state.
        params = jax.device_put(params, program.abstract.step.sharding)
        state = dataclasses.replace(state, params=params)
    shardings = program.step.executable().input_shardings[0][1]
    return program.step(state, jax.device_put(batch, shardings))


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


def test_it_adds_four_variables() -> None:
    """Mean and var among the statistics, scale and bias among the parameters."""
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


@pytest.mark.slow
def test_initial_statistics_do_not_depend_on_the_batch() -> None:
    """Initialization updates nothing, and does not need the axis that training has."""
    state = programs(MLP(momentum=0.5)).init()
    statistics = state.collections['batch_stats']['BatchNorm_0']
    assert statistics['mean'].tolist() == [0.0] * 4
    assert statistics['var'].tolist() == [1.0] * 4
    variables = MLP(axis_name='batch').init(jax.random.key(0), rows(), train=False)
    assert variables['batch_stats']['BatchNorm_0']['var'].tolist() == [1.0] * 4


@pytest.mark.slow
def test_training_and_evaluation_use_different_statistics() -> None:
    """`train` is passed automatically; training uses the batch, evaluation the averages."""
    model = MLP(momentum=0.5)
    program = programs(model)
    variables = jax.device_get(program.init().variables)
    batch = {'x': rows()}
    expected, moved = model.apply(variables, batch['x'], train=True, mutable=['batch_stats'])
    state = run_step(program, batch)
    loss = state.metrics['task'].loss.compute()
    assert float(loss) == pytest.approx(float((expected**2).mean()), rel=1e-5)
    assert_close(state.collections['batch_stats'], moved['batch_stats'])
    evaluation = EvalStep(model=as_functional(model), task=TaskRunner.from_task(square), seed=0)
    after, real = jax.device_get(state.variables), {**batch, MASK: np.ones(16, bool)}
    totals = evaluation.empty(evaluation.output_shapes(after, real))
    totals = evaluation(totals, after, state.step, jnp.int32(0), real)
    left = (model.apply(after, batch['x'], train=False) ** 2).mean()
    again, _ = model.apply(after, batch['x'], train=True, mutable=['batch_stats'])
    assert float(totals['task'].loss.compute()) == pytest.approx(float(left), rel=1e-5)
    assert float((again**2).mean()) != pytest.approx(float(left), rel=1e-2)


class Norm(nn.Module):
    """Only normalizes."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


def test_the_momentum_of_a_constant() -> None:
    """Mean and variance move by a tenth of the way to those of a constant input."""
    state = run_step(programs(Norm()), {'x': np.full((16, 3), 2, np.float32)})
    statistics = state.collections['batch_stats']['BatchNorm_0']
    np.testing.assert_allclose(statistics['mean'], np.full(3, 0.2), rtol=1e-6)
    np.testing.assert_allclose(statistics['var'], np.full(3, 0.9), rtol=1e-6)


def test_immutable_statistics_are_an_error_in_training() -> None:
    """Training mode with `mutable=False` raises."""
    model = MLP()
    variables = model.init(jax.random.key(0), rows(), train=False)
    before = jax.device_get(variables)
    model.apply(variables, rows(), train=False, mutable=False)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    with pytest.raises(errors.ModifyScopeVariableError):
        model.apply(variables, rows(), train=True, mutable=False)


def run_pmap(model: nn.Module, variables: Any, x: np.ndarray) -> tuple[Any, Any]:
    """Returns outputs and statistics of `pmap` with a shard of the batch on each device."""

    def run(variables: Any, x: jax.Array) -> Any:
        return model.apply(variables, x, train=True, mutable=['batch_stats'])

    sliced = x.reshape(DEVICES, -1, 3)
    return jax.pmap(run, axis_name='batch')(jax_utils.replicate(variables), sliced)


def test_statistics_over_devices() -> None:
    """Equal for a batch over eight devices, `pmap` with an axis, and one device."""
    x = rows()
    variables = MLP().init(jax.random.key(0), x, train=False)
    whole, moved = MLP().apply(variables, x, train=True, mutable=['batch_stats'])
    outputs, statistics = run_pmap(MLP(axis_name='batch'), variables, x)
    np.testing.assert_allclose(outputs.reshape(-1, 1), whole, rtol=1e-4, atol=1e-5)
    assert not np.allclose(run_pmap(MLP(), variables, x)[0].reshape(-1, 1), whole, atol=1e-3)
    state = run_step(programs(MLP()), {'x': x}, variables)
    for found in (jax_utils.unreplicate(statistics), state.collections):
        assert_close(found['batch_stats'], moved['batch_stats'])


@pytest.mark.slow
def test_statistics_of_groups() -> None:
    """Two halves of a batch, in a step over eight devices and with `axis_index_groups`."""
    x = rows()
    variables = MLP().init(jax.random.key(0), x, train=False)

    def halves(params: Any) -> tuple[Any, Any]:
        each = [
            MLP().apply({**variables, 'params': params}, half, train=True, mutable=['batch_stats'])
            for half in np.split(x, 2)
        ]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *[moved for _, moved in each])
        return jnp.concatenate([output for output, _ in each]), mean

    outputs, moved = halves(variables['params'])
    devices = [list(range(DEVICES // 2)), list(range(DEVICES // 2, DEVICES))]
    replicas, statistics = run_pmap(MLP(axis_name='batch', groups=devices), variables, x)
    np.testing.assert_allclose(replicas.reshape(-1, 1), outputs, rtol=1e-4, atol=1e-5)
    model = MLP(norm=functools.partial(GroupedBatchNorm, groups=2))
    state = run_step(programs(model), {'x': x}, variables)
    loss = state.metrics['task'].loss.compute()
    assert float(loss) == pytest.approx(float((outputs**2).mean()), rel=1e-5)
    averaged = jax.tree.map(lambda x: x.mean(0), statistics)
    for found in (averaged, state.collections):
        assert_close(found['batch_stats'], moved['batch_stats'])
    grads = jax.grad(lambda params: (halves(params)[0] ** 2).mean())(variables['params'])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables['params'], grads)
    assert_close(jax.device_get(state.params), params)
    # And it is not the same as one group.
    whole, _ = MLP().apply(variables, x, train=True, mutable=['batch_stats'])
    assert float((whole**2).mean()) != pytest.approx(float(loss), rel=1e-3)


def test_groups_compared_with_flax() -> None:
    """With one group, in evaluation and in a first call it is `nn.BatchNorm`; masks count."""
    x, mask = rows(), np.arange(16)[:, None] % 3 > 0
    plain = nn.BatchNorm(use_running_average=False)
    variables = plain.init(jax.random.key(0), x)
    grouped = GroupedBatchNorm(groups=4)
    assert_close(grouped.init(jax.random.key(0), x[:3], use_running_average=False), variables)
    for other in (grouped, GroupedBatchNorm(use_running_average=False)):
        running = None if other.use_running_average is False else True
        like = plain if running is None else nn.BatchNorm()
        found = other.apply(variables, x, running, mutable=['batch_stats'])
        assert_close(found, like.apply(variables, x, running, mutable=['batch_stats']))
    found, _ = grouped.apply(variables, x, False, mask=mask, mutable=['batch_stats'])
    expected = [
        plain.apply(variables, part, mask=some, mutable=['batch_stats'])[0]
        for part, some in zip(np.split(x, 4), np.split(mask, 4), strict=True)
    ]
    assert_close(found, np.concatenate(expected))
    with pytest.raises(ValueError, match='15 examples are not divisible into groups=4'):
        grouped.apply(variables, x[:15], False, mutable=['batch_stats'])
    with pytest.raises(errors.ModifyScopeVariableError):
        grouped.apply(variables, x, False)


@pytest.mark.slow
def test_a_grouped_layer_is_recorded_once() -> None:
    """A recorder sees one call, with all examples."""
    model = ResNet(stages=(1,), features=4, stem='small', num_classes=3, norm_groups=2)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype('f4')
    variables = model.init(jax.random.key(0), x)
    assert_close(variables, model.clone(norm_groups=1).init(jax.random.key(0), x))
    keep = ['batch_stats', 'intermediates']
    outputs, kept = model.apply(variables, x, True, mutable=keep, capture_intermediates=True)
    (seen,) = kept['intermediates']['bn_init']['__call__']
    assert seen.shape == (4, 8, 8, 4)
    one, _ = model.clone(norm_groups=1).apply(variables, x[:2], True, mutable=['batch_stats'])
    np.testing.assert_allclose(outputs[:2], one, rtol=1e-4, atol=1e-5)


def test_a_pmap_axis_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    """The statistics of a step are those of the global batch without it."""
    x = {'x': rows()}
    jax.tree.map(
        np.testing.assert_array_equal,
        run_step(programs(MLP(axis_name='batch')), x).variables,
        run_step(programs(MLP()), x).variables,
    )
    assert "names the jax.pmap axis 'batch'" in caplog.text
    with pytest.raises(
        UserError, match=r'groups of devices .*trainer.models.norm:GroupedBatchNorm'
    ):
        programs(MLP(axis_name='batch', groups=[[0, 1]]))


@pytest.mark.slow
def test_statistics_under_vmap() -> None:
    """A `vmap` axis synchronizes the statistics, which are returned once."""
    x = rows()
    model = MLP(axis_name='batch')
    variables = MLP().init(jax.random.key(0), x, train=False)

    def one(x: jax.Array) -> Any:
        return model.apply(variables, x, train=True, mutable=['batch_stats'])

    outputs, moved = jax.vmap(one, axis_name='batch', out_axes=(0, None))(x)
    whole, expected = MLP().apply(variables, x, train=True, mutable=['batch_stats'])
    np.testing.assert_allclose(outputs, whole, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), moved, expected)


@pytest.mark.slow
def test_statistics_stay_float32() -> None:
    """Also for a model that computes in bfloat16."""
    program = programs(MLP(), precision=Precision(compute='bfloat16'))
    state = run_step(program, {'x': rows()})
    assert {x.dtype for x in jax.tree.leaves(state.collections)} == {np.dtype('float32')}
    half = nn.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)
    variables = half.init(jax.random.key(0), jnp.ones((4, 3)))
    out, _ = half.apply(variables, jnp.ones((4, 3)), mutable=['batch_stats'])
    assert out.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype('float32')}
