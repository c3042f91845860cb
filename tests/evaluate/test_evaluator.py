# SPDX-License-Identifier: Apache-2.0
"""Every example of a split counts once, for any batch size and number of devices."""

from __future__ import annotations

import itertools
from typing import Any

import clu.metrics
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors as flax_errors

from tests.marks import slow_except
from trainer.config.errors import UserError
from trainer.data.loader import EvalLoader
from trainer.data.mnist import MNIST
from trainer.data.sources import ArraySource
from trainer.data.stages import Filter
from trainer.data.streaming import StreamEvalLoader
from trainer.data.transforms import ToFloat
from trainer.evaluate.evaluator import EvalStep, Evaluator
from trainer.evaluate.pad import pad_shard_unpad
from trainer.input.data import EvalData
from trainer.modules.functional import as_functional
from trainer.parallel.mesh import batch_shards
from trainer.step.state import TrainState
from trainer.tasks import Classification, TaskOutput
from trainer.tasks.runner import TaskRunner


def mesh_of(devices: int) -> jax.sharding.Mesh:
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh(
        (devices,), ('data',), devices=jax.devices()[:devices], axis_types=axis_types
    )


class AlwaysZero(nn.Module):
    """Predicts class 0 for everything, so padding that counts would change the accuracy."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bias = self.param('bias', lambda _: 5.0 * jax.nn.one_hot(0, 10))
        return jnp.broadcast_to(bias, (x.shape[0], 10))


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def state_of(module: nn.Module, shape: tuple[int, ...]) -> TrainState:
    variables = dict(module.init(jax.random.key(0), jnp.zeros((1, *shape))))
    params = variables.pop('params')
    return TrainState(
        step=jnp.int32(0), params=params, opt_state=(), collections=variables, metrics=()
    )


def evaluator_of(module: nn.Module, source: Any, batch_size: int, devices: int) -> Evaluator:
    mesh = mesh_of(devices)
    shards = batch_shards(mesh)
    loader = EvalLoader(
        source=source,
        batch_size=batch_size,
        transforms=(ToFloat(),),
        padded_to=-(-batch_size // shards) * shards,
    )
    step = EvalStep(
        model=as_functional(module), task=TaskRunner.from_task(Classification()), seed=0
    )
    return Evaluator('test', step, EvalData.from_loader(loader, 'loader'), mesh)


@pytest.mark.parametrize(
    ('devices', 'batch_size'),
    slow_except(
        [(8, 272), (8, 3), (1, 10_000)],
        itertools.product((1, 8), (512, 272, 1000, 3, 10_000)),
    ),
)
def test_always_zero_on_mnist(devices: int, batch_size: int) -> None:
    """980 of 10,000, never 9,728 or 8,192 as denominator, compiled once."""
    source = MNIST('test') if batch_size > 3 else MNIST('test', limit=100)
    evaluator = evaluator_of(AlwaysZero(), source, batch_size, devices)
    metrics = evaluator.run(state_of(AlwaysZero(), (28, 28, 1)))
    zeros = int((source.gather(np.arange(len(source)))['label'] == 0).sum())
    assert metrics['examples'] == len(source)
    assert metrics['accuracy'] == pytest.approx(zeros / len(source), abs=1e-7)
    if len(source) == 10_000:
        assert zeros == 980
    assert evaluator.compiles == 1


@pytest.mark.parametrize('examples', [1, 5, 8, 17])
def test_fewer_examples_than_devices_and_uneven_batches(examples: int) -> None:
    """One example, fewer than devices, an uneven last batch; the metrics equal numpy's."""
    module, source = Linear(), MNIST('test', limit=examples)
    state = state_of(module, (28, 28, 1))
    metrics = evaluator_of(module, source, 8, 8).run(state)
    batch = source.gather(np.arange(examples))
    logits = module.apply({'params': state.params}, batch['image'] / np.float32(255))
    log_p = np.asarray(jax.nn.log_softmax(logits))
    assert metrics['examples'] == examples
    assert metrics['loss'] == pytest.approx(
        -log_p[np.arange(examples), batch['label']].mean(), rel=1e-5
    )
    assert metrics['accuracy'] == pytest.approx((log_p.argmax(-1) == batch['label']).mean())


def stream_evaluator(module: nn.Module, batch_size: int, *stages: Any) -> Evaluator:
    """Returns an evaluator of MNIST's test split, read as a stream of unknown length."""
    loader = StreamEvalLoader(
        source=MNIST('test'), batch_size=batch_size, transforms=(ToFloat(),), stages=stages
    )
    step = EvalStep(
        model=as_functional(module), task=TaskRunner.from_task(Classification()), seed=0
    )
    return Evaluator('test', step, EvalData.from_loader(loader, 'loader'), mesh_of(8))


@pytest.mark.slow
@pytest.mark.parametrize('batch_size', [512, 4096])
def test_always_zero_on_a_stream_of_unknown_length(batch_size: int) -> None:
    """980 of 10,000 on 8 devices, compiled once; it ends when no process has examples left."""
    evaluator = stream_evaluator(AlwaysZero(), batch_size)
    assert evaluator.data.num_batches is None
    metrics = evaluator.run(state_of(AlwaysZero(), (28, 28, 1)))
    assert metrics['examples'] == 10_000
    assert round(metrics['accuracy'] * 10_000, 3) == 980
    assert evaluator.compiles == 1


def is_odd(example: Any) -> bool:
    return bool(example['label'] % 2)


@pytest.mark.slow
def test_a_filtered_stream_is_evaluated_exactly() -> None:
    """Examples, loss and accuracy of the filtered split equal numpy's."""
    module = Linear()
    state = state_of(module, (28, 28, 1))
    metrics = stream_evaluator(module, 1000, Filter(keep=is_odd)).run(state)
    everything = MNIST('test').gather(np.arange(10_000))
    odd = everything['label'] % 2 == 1
    labels = everything['label'][odd]
    dense = jax.device_get(state.params['Dense_0'])
    images = everything['image'][odd].reshape(len(labels), -1) / 255.0
    logits = images @ dense['kernel'] + dense['bias']
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert metrics['examples'] == odd.sum() == 5074
    assert metrics['loss'] == pytest.approx(-log_p[np.arange(len(labels)), labels].mean(), rel=1e-5)
    assert metrics['accuracy'] == pytest.approx((logits.argmax(-1) == labels).mean(), abs=1e-7)


class CluTask:
    """A task with metrics of clu, which take a mask instead of weights."""

    metrics = clu.metrics.Collection.create(
        accuracy=clu.metrics.Accuracy, loss=clu.metrics.Average.from_output('per_example')
    )

    def __call__(self, model: Any, batch: Any) -> TaskOutput:
        logits = model(batch['image'])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
        extra = {'logits': logits, 'labels': batch['label'], 'per_example': loss}
        return TaskOutput(loss=loss, metrics=extra)


def test_metrics_of_clu_ignore_padding() -> None:
    state, source = state_of(Linear(), (28, 28, 1)), MNIST('test', limit=1000)
    ours = evaluator_of(Linear(), source, 96, 8).run(state)
    mesh = mesh_of(8)
    loader = EvalLoader(source=source, batch_size=96, transforms=(ToFloat(),))
    step = EvalStep(model=as_functional(Linear()), task=TaskRunner.from_task(CluTask()), seed=0)
    theirs = Evaluator('test', step, EvalData.from_loader(loader, 'loader'), mesh).run(state)
    assert theirs['accuracy'] == pytest.approx(ours['accuracy'], abs=1e-6)
    assert theirs['loss'] == pytest.approx(ours['loss'], rel=1e-5)


def test_the_order_of_examples_does_not_matter() -> None:
    """B-rows: the same split shuffled gives the same accuracy and loss."""
    everything = MNIST('test').gather(np.arange(1000))
    order = np.random.default_rng(0).permutation(1000)
    shuffled = {name: x[order] for name, x in everything.items()}
    state = state_of(Linear(), (28, 28, 1))
    a, b = (
        evaluator_of(Linear(), ArraySource(arrays), 96, 8).run(state)
        for arrays in (everything, shuffled)
    )
    assert a['accuracy'] == b['accuracy']
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-6)


def test_evaluation_does_not_change_the_state() -> None:
    """The training accumulators do not change."""
    state = state_of(Linear(), (28, 28, 1))
    before = jax.device_get(state)
    evaluator_of(Linear(), MNIST('test', limit=20), 8, 8).run(state)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))


def test_a_module_left_in_train_mode_is_refused() -> None:
    """An error, as in Flax, instead of statistics that change during an evaluation."""

    class Stuck(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.BatchNorm(use_running_average=False)(x.reshape(x.shape[0], -1))
            return nn.Dense(10)(x)

    with pytest.raises(UserError, match='The model must know whether it is training') as caught:
        evaluator_of(Stuck(), MNIST('test', limit=8), 8, 1).run(state_of(Stuck(), (28, 28, 1)))
    assert isinstance(caught.value.__cause__, flax_errors.ModifyScopeVariableError)


def test_active_dropout_at_evaluation_is_refused() -> None:
    """The error says that the model must know whether it is training."""

    class Stuck(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(10)(nn.Dropout(0.5, deterministic=False)(x.reshape(x.shape[0], -1)))

    variables = Stuck().init(
        {'params': jax.random.key(0), 'dropout': jax.random.key(1)}, jnp.zeros((1, 784))
    )
    state = TrainState(
        step=jnp.int32(0), params=variables['params'], opt_state=(), collections={}, metrics=()
    )
    with pytest.raises(UserError, match='The model must know whether it is training') as caught:
        evaluator_of(Stuck(), MNIST('test', limit=8), 8, 1).run(state)
    assert isinstance(caught.value.__cause__, flax_errors.InvalidRngError)


# ---- pad_shard_unpad ---------------------------------------------------------------------------


def test_pads_shards_and_unpads() -> None:
    """Rows are computed on their own devices and returned as numpy, without padding."""
    shards: list[Any] = []

    @jax.jit
    def double(scale: jax.Array, batch: Any) -> Any:
        return {'y': batch['x'] * scale}

    def call(scale: Any, batch: Any) -> Any:
        shards.append(batch['x'].sharding.shard_shape(batch['x'].shape))
        return double(scale, batch)

    x = np.arange(13, dtype=np.float32)
    out = pad_shard_unpad(call)(np.float32(2), {'x': x}, min_device_batch=4)
    assert isinstance(out['y'], np.ndarray)
    np.testing.assert_array_equal(out['y'], 2 * x)
    assert shards == [(4,)]


def test_accumulators_are_static_and_stay_on_the_devices() -> None:
    """(980, 10000) over MNIST's test split in batches of 512, with one compilation."""
    traces = []

    @jax.jit
    def count(totals: Any, batch: Any) -> Any:
        traces.append(1)
        hit = batch['mask'] & (batch['label'] == 0)
        return {'hits': totals['hits'] + hit.sum(), 'all': totals['all'] + batch['mask'].sum()}

    step = pad_shard_unpad(count, static_argnums=(0,), static_return=True)
    labels = MNIST('test').gather(np.arange(10_000))['label']
    totals = {'hits': jnp.int32(0), 'all': jnp.int32(0)}
    for start in range(0, 10_000, 512):
        part = labels[start : start + 512]
        batch = {'label': part, 'mask': np.ones(part.shape, bool)}
        totals = step(totals, batch, min_device_batch=64)
    assert (int(totals['hits']), int(totals['all'])) == (980, 10_000)
    assert len(traces) == 1


def test_inconsistent_batch_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match='inconsistent batch sizes'):
        pad_shard_unpad(lambda a, b, c: b)(1, np.zeros(3), np.zeros(4))
