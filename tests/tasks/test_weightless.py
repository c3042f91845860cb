# SPDX-License-Identifier: Apache-2.0
"""An example of weight 0 affects no parameter, metric or other example, whatever its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.marks import slow_after
from trainer.config.errors import UserError
from trainer.evaluate.evaluator import summarize
from trainer.evaluate.step import EvalStep
from trainer.modules.functional import as_functional
from trainer.observe import flops
from trainer.parallel.mesh import batch_sharding, make_mesh
from trainer.run import checks
from trainer.step.context import StepContext
from trainer.step.one_model import TrainStep
from trainer.step.optimizer import Group, Optimizer
from trainer.step.programs import Programs
from trainer.step.state import TrainState
from trainer.tasks import Classification, NextToken, Regression, TaskOutput
from trainer.tasks.runner import MASK, TaskRunner, compute_metrics

ROWS = 16
# Two adjacent ones, the first and the last; each micro-batch of 4 has an example that counts.
DEAD = np.array([0, 3, 4, 7, 9, 15])


class Net(nn.Module):
    """Divides by the norm of each example, which has no derivative at 0."""

    outputs: int = 4
    dropout: float = 0.0
    layer: Any = nn.Dense

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        count = self.variable('counts', 'calls', lambda: jnp.zeros((), jnp.int32))
        if train:
            count.value += 1
        x = nn.relu(self.layer(8, name='Dense_0')(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.outputs, name='Dense_1')(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.first(x / jnp.linalg.norm(x, axis=-1, keepdims=True))))


def batch_of(fill: float, label: int = 0) -> dict[str, np.ndarray]:
    """Returns the same batch for any `fill`, except for the examples of weight 0."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 5)).astype(np.float32)
    batch = {
        'x': x,
        'label': rng.integers(0, 4, ROWS).astype(np.int32),
        'targets': rng.normal(size=(ROWS, 4)).astype(np.float32),
        'weight': rng.uniform(0.5, 2, ROWS).astype(np.float32),
    }
    for name in ('x', 'targets'):
        batch[name][DEAD] = fill
    batch['label'][DEAD], batch['weight'][DEAD] = label, 0
    return batch


def cross_entropy(model: Any, batch: Any) -> TaskOutput:
    loss = optax.softmax_cross_entropy_with_integer_labels(model(batch['x']), batch['label'])
    return TaskOutput(loss=loss, weights=batch['weight'], metrics={'first': batch['x'][:, 0]})


def two_losses(model: Any, batch: Any) -> TaskOutput:
    errors = (model(batch['x']) - batch['targets']) ** 2
    weights = {'a': batch['weight'], 'b': (batch['weight'] > 0) * 1.0, 'metrics': batch['weight']}
    return TaskOutput(loss={'a': errors[:, 0], 'b': errors[:, 1]}, weights=weights)


def weigh_by_logits(model: Any, batch: Any) -> TaskOutput:
    """A task with weights from the model's output: non-finite examples do not count."""
    logits = model(batch['x'])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return TaskOutput(loss=loss, weights=jnp.isfinite(logits).all(-1) & (batch['weight'] > 0))


def programs(
    task: Any, model: Any = None, *, devices: int = 1, batch: Any = None, **options: Any
) -> Programs:
    mesh = mesh_of(devices)
    optimizer = options.pop('optimizer', Optimizer(base=optax.sgd(0.1)))
    step = TrainStep(StepContext(
        model=as_functional(Net() if model is None else model), task=TaskRunner.from_task(task),
        optimizer=optimizer, seed=0, shards=devices, **options
))  # fmt: skip
    batch = batch_of(0.0) if batch is None else batch
    spec = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in batch.items()}
    return Programs(step, spec, mesh)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    if devices == jax.device_count():
        return make_mesh({'data': -1})
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ('data',), devices=jax.devices()[:1], axis_types=axis_types)


def run_steps(program: Programs, batch: Any, *, devices: int = 1, steps: int = 2) -> TrainState:
    state = program.init()
    read = {name: batch[name] for name in program.fields.sent}
    read = jax.device_put(read, batch_sharding(mesh_of(devices)))
    for _ in range(steps):
        state = program.step(state, read)
    return jax.device_get(state)


def same(a: TrainState, b: TrainState) -> None:
    """Checks that parameters, collections and metrics are bit-equal, and all finite."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((a.params, a.metrics)))


TASKS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    'classification': (Classification(inputs='x', weight='weight'), None, {}),
    'regression': (Regression(inputs='x', targets='targets', weight='weight'), None, {}),
    'function': (cross_entropy, None, {}),
    'micro-batches': (cross_entropy, None, {'accumulate': 4}),
    'of NNX': (cross_entropy, NNXNet, {}),
    'by logits': (weigh_by_logits, None, {}),
    'two losses': (
        two_losses, None,
        {'optimizer': Optimizer(groups={
            'a': Group(params=('Dense_0/.*',), optimizer=Optimizer(base=optax.sgd(0.1)), loss='a'),
            'b': Group(params=('Dense_1/.*',), optimizer=Optimizer(base=optax.sgd(0.1)), loss='b'),
        })},
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', slow_after(1, TASKS))
def test_values_of_weight_0_change_nothing(name: str) -> None:
    task, model, options = TASKS[name]
    program = programs(task, model, **options)
    expected = run_steps(program, batch_of(1.0))
    for fill, label in ((np.nan, 3), (np.inf, -1), (1e38, 1000)):
        same(expected, run_steps(program, batch_of(fill, label)))
    assert program.step.compiles == 1
    assert int(expected.collections.get('counts', {}).get('calls', 2 * 1)) == 2 * options.get(
        'accumulate', 1
    )


@pytest.mark.slow
def test_values_of_weight_0_change_nothing_on_eight_devices() -> None:
    program = programs(cross_entropy, devices=8)
    expected = run_steps(program, batch_of(1.0), devices=8)
    same(expected, run_steps(program, batch_of(np.nan), devices=8))
    alone = run_steps(programs(cross_entropy), batch_of(np.nan))
    for x, y in zip(jax.tree.leaves(expected.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_update_is_that_of_the_counted_examples() -> None:
    """Compared with the gradient of a batch without the other examples."""
    program, batch = programs(cross_entropy), batch_of(np.nan)
    params = jax.device_get(program.init().params)
    live = {name: np.delete(x, DEAD, axis=0) for name, x in batch.items()}

    def loss(params: Any) -> jax.Array:
        variables = {'params': params, 'counts': {'calls': jnp.int32(0)}}
        logits = Net().apply(variables, live['x'])
        values = optax.softmax_cross_entropy_with_integer_labels(logits, live['label'])
        return (values * live['weight']).sum() / live['weight'].sum()

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    state = run_steps(program, batch, steps=1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), state.params, expected)
    metrics = compute_metrics(state.metrics)['task']
    assert metrics['loss'] == pytest.approx(float(loss(params)), rel=1e-5)
    mean = np.average(live['x'][:, 0], weights=live['weight'])
    assert metrics['first'] == pytest.approx(mean, rel=1e-4)


def test_batch_without_counted_examples() -> None:
    model = nn.Dense(4)
    batch = {**batch_of(np.nan), 'weight': np.zeros(ROWS, np.float32)}
    batch['x'][:] = np.nan
    program = programs(cross_entropy, model)
    state, before = run_steps(program, batch), jax.device_get(program.init().params)
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_tokens_of_weight_0() -> None:
    """One example has only tokens of weight 0; another has some of them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 7, (8, 6)).astype(np.int32)
    weight = (rng.uniform(size=(8, 6)) > 0.3).astype(np.float32)
    scale = np.ones((8, 1, 1), np.float32)
    weight[2] = 0

    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
            return nn.Dense(7)(nn.Embed(7, 4)(tokens) * positions)

    task = NextToken(positions='scale', weight='weight')
    batch = {'tokens': tokens, 'weight': weight, 'scale': scale}
    program = programs(task, Tokens(), batch=batch)
    expected = run_steps(program, batch)
    bad = {**batch, 'scale': scale.copy(), 'tokens': tokens.copy()}
    bad['scale'][2], bad['tokens'][2] = np.nan, 99
    same(expected, run_steps(program, bad))


@pytest.mark.parametrize('fill', [1.0, np.nan])
def test_values_of_weight_0_do_not_affect_evaluations(fill: float) -> None:
    """With examples that do not count, and padding that repeats one of them."""
    batch = batch_of(fill)
    mask = np.ones(ROWS, bool)
    mask[-3:] = False
    for name, x in batch.items():
        x[-3:] = x[:1]  # As the loader pads: with the first row, whose weight is 0.
        assert name != 'weight' or x[-1] == 0
    step = EvalStep(model=as_functional(Net()), task=TaskRunner.from_task(cross_entropy), seed=0)
    variables = Net().init(jax.random.key(0), jnp.ones((1, 5)))
    args = (variables, jnp.int32(0), jnp.int32(0), {**batch, MASK: mask})
    totals = jax.jit(step)(step.empty(step.output_shapes(variables, args[-1])), *args)
    metrics = summarize(totals)
    assert metrics['examples'] == ROWS - 3
    live = [i for i in range(ROWS - 3) if i not in DEAD]
    logits = Net().apply(variables, batch['x'][live])
    values = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'][live])
    expected = np.average(values, weights=batch['weight'][live])
    assert metrics['loss'] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_second_run_uses_the_same_random_numbers_and_collections() -> None:
    """Weights of 1 change nothing, including dropout."""

    def plain(model: Any, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(batch['x']), batch['label'])

    def weighted_task(model: Any, batch: Any) -> TaskOutput:
        return TaskOutput(loss=plain(model, batch), weights=jnp.ones(ROWS))

    batch = batch_of(1.0)
    a, b = (run_steps(programs(task, Net(dropout=0.5)), batch) for task in (plain, weighted_task))
    same(a, b)
    assert int(b.collections['counts']['calls']) == 2


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(4)(nn.BatchNorm(use_running_average=not train)(x))


def plain_task(model: Any, batch: Any) -> jax.Array:
    return (model(batch['x']) ** 2).mean(-1)


@pytest.mark.parametrize(
    ('task', 'model', 'padded', 'why'),
    [
        (plain_task, Normed, True, "(config.data.remainder='pad')"),
        (cross_entropy, Normed, False, '(a task that returns weights)'),
        (cross_entropy, Normed, True, "(config.data.remainder='pad' and a task that returns"),
        (plain_task, Normed, False, None),
        (cross_entropy, Net, True, None),
    ],
)
def test_batch_statistics_are_warned_about(
    task: Any, model: Any, padded: bool, why: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    batch = {**batch_of(1.0), **({MASK: np.ones(ROWS, bool)} if padded else {})}
    checks.warn_of_padding_in_batch_stats(programs(task, model(), batch=batch))
    assert (why in caplog.text) if why else not caplog.text


def test_batch_statistics_are_finite_for_any_value_of_weight_0() -> None:
    program = programs(cross_entropy, Normed())
    same(run_steps(program, batch_of(1.0)), run_steps(program, batch_of(np.nan)))


@pytest.mark.parametrize('accumulate', slow_after(1, [1, 2]))
@pytest.mark.parametrize('layer', slow_after(1, [nn.Dense, nn.remat(nn.Dense)]))
def test_program_has_one_forward_pass(accumulate: int, layer: Any) -> None:
    def costs(task: Callable[..., Any]) -> tuple[float, float, int]:
        step = programs(task, Net(layer=layer), accumulate=accumulate).step
        text = step.executable().as_text() or ''
        products = text.count(' dot(') + text.count('__onednn') + text.count('custom-call')
        return flops.count(step.jaxpr()), step.flops() or 0.0, products

    def plain_task(model: Any, batch: Any) -> Any:
        output = cross_entropy(model, batch)
        return output.loss, {'first': output.metrics['first'], 'weight': batch['weight']}

    without, given = costs(plain_task), costs(cross_entropy)
    assert given[0] == without[0] > 0
    # Replacing examples costs little compared with a matrix product.
    assert without[1] < given[1] < 1.3 * without[1]
    assert given[2] == without[2] > 0


def test_task_without_weights_runs_once() -> None:
    def plain(model: Any, batch: Any) -> jax.Array:
        return model(batch['x'])[:, 0] ** 2

    program = programs(plain)
    assert program.task.is_weighted is False
    assert program.fields.sent == {'x'}
    assert programs(cross_entropy).task.is_weighted is True


def test_metrics_without_weights_count_all_examples() -> None:
    def task(model: Any, batch: Any) -> TaskOutput:
        x = model(batch['x'])
        weights = {'a': batch['weight']}
        return TaskOutput(loss={'a': x[:, 0] ** 2}, weights=weights, metrics={'first': x[:, 0]})

    batch = batch_of(1.0)
    group = Group(params=('.*',), optimizer=Optimizer(base=optax.sgd(0.1)), loss='a')
    program = programs(task, optimizer=Optimizer(groups={'all': group}))
    variables = jax.device_get(program.init())
    expected = Net().apply(variables.variables, batch['x'])[:, 0].mean()
    state = run_steps(program, batch, steps=1)
    assert compute_metrics(state.metrics)['task']['first'] == pytest.approx(float(expected), 1e-4)


def test_losses_that_are_not_per_example_are_not_replaced() -> None:
    """One loss per element, flattened: the example of each is unknown."""

    def task(model: Any, batch: Any) -> TaskOutput:
        errors = (model(batch['x']) - batch['targets']) ** 2
        return TaskOutput(loss=errors.ravel(), weights=jnp.repeat(batch['weight'], 4))

    program = programs(task)
    assert program.task.is_weighted is False
    assert np.isfinite(jax.tree.leaves(run_steps(program, batch_of(1.0)).params)[0]).all()


def test_weights_of_another_length_are_rejected() -> None:
    def task(model: Any, batch: Any) -> TaskOutput:
        return TaskOutput(loss=model(batch['x'])[:, 0], weights=batch['weight'][1:])

    with pytest.raises(UserError, match=r'float32\[15\] as the weights of a loss float32\[16\]'):
        _ = programs(task).step


def test_weights_of_an_unknown_loss_are_rejected() -> None:
    def task(model: Any, batch: Any) -> TaskOutput:
        return TaskOutput(loss=model(batch['x'])[:, 0], weights={'a': batch['weight']})

    with pytest.raises(UserError, match='returned weights for'):
        programs(task)


class Scaled(nn.Module):
    """Divides by the norm of each example: examples of zeros become NaN."""

    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dense(4)(x / jnp.linalg.norm(x, axis=-1, keepdims=True))


@pytest.mark.parametrize('accumulate', slow_after(1, [1, 2]))
def test_nothing_changes_without_counted_examples(accumulate: int) -> None:
    """Neither parameters nor statistics, for a batch or a micro-batch of weight 0."""
    batch = batch_of(1.0)
    batch['weight'] = np.zeros_like(batch['weight'])
    if accumulate == 2:
        batch['weight'][: ROWS // 2] = 1
    made = programs(cross_entropy, Scaled(batch_norm=True), accumulate=accumulate)
    before = made.init()
    after = run_steps(made, batch, steps=1)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))
    if accumulate == 1:
        old, new = ((state.params, state.collections) for state in (before, after))
        jax.tree.map(np.testing.assert_array_equal, old, new)
        return
    # As if the batch were only the first micro-batch.
    half = {name: x[: ROWS // 2] for name, x in batch.items()}
    expected = run_steps(
        programs(cross_entropy, Scaled(batch_norm=True), batch=half), half, steps=1
    )
    for a, b in zip(
        jax.tree.leaves((after.params, after.collections)),
        jax.tree.leaves((expected.params, expected.collections)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
