# SPDX-License-Identifier: Apache-2.0
"""Dtypes of parameters, computation and output, and the dynamic loss scale."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.command import ROOT
from tests.marks import slow_after
from trainer.experiment import load_and_build
from trainer.models.mlp import MLP
from trainer.modules.functional import as_functional
from trainer.modules.precision import Precision
from trainer.modules.rng import Keys
from trainer.parallel.mesh import batch_sharding, make_mesh
from trainer.parallel.sharding import FSDP, Rule
from trainer.step.context import StepContext
from trainer.step.loss_scale import LossScale
from trainer.step.one_model import TrainStep
from trainer.step.optimizer import Optimizer
from trainer.step.programs import Programs
from trainer.tasks import Classification, TaskOutput
from trainer.tasks.runner import TaskRunner, compute_metrics
from trainer.trainer import Trainer

BF16 = Precision(compute='bfloat16', output='float32')
F16 = Precision(compute='float16', output='float32')
ONE, EIGHT = {'data': 1}, {'data': 2, 'fsdp': 4}
SEEN: dict[str, Any] = {}


class Watched(nn.Module):
    """A model that records the dtypes of its values."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        hidden = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        count = self.variable('state', 'mean', lambda: jnp.zeros((), jnp.float32))
        if train:
            count.value = hidden.mean()
        SEEN.update(x=x.dtype, hidden=hidden.dtype)
        return nn.Dense(4)(hidden)


def classify(model: Any, batch: Mapping[str, jax.Array]) -> TaskOutput:
    output = Classification(inputs='x')(model, batch)
    SEEN['kernel'] = model.params['Dense_0']['kernel'].dtype
    SEEN['logits'] = model(batch['x']).dtype
    # A loss that overflows if the batch requests it.
    return output.replace(loss=output.loss * jnp.where(batch['bad'], jnp.inf, 1.0))


def programs(
    module: nn.Module,
    precision: Precision = F16,
    *,
    mesh: Mapping[str, int] = ONE,
    sharding: tuple[Rule, ...] = (),
    rows: int = 16,
    **options: Any,
) -> Programs:
    size = int(np.prod(list(mesh.values())))
    types = (jax.sharding.AxisType.Auto,) * len(mesh)
    devices = jax.devices()[:size]
    made = jax.make_mesh(tuple(mesh.values()), tuple(mesh), types, devices=devices)
    options.setdefault('optimizer', Optimizer(base=optax.sgd(0.1, momentum=0.9)))
    step = TrainStep(
        StepContext(
            model=as_functional(module, precision),
            task=TaskRunner.from_task(classify),
            seed=0,
            shards=size,
            **options,
        )
    )
    spec = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch_of(rows).items()}
    return Programs(step, spec, made, sharding=sharding)


def batch_of(rows: int = 16, seed: int = 0, bad: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        'x': rng.normal(size=(rows, 8)).astype(np.float32),
        'label': rng.integers(0, 4, rows).astype(np.int32),
        'bad': np.full(rows, bad),
    }


def train(made: Programs, steps: int = 5, bad: tuple[int, ...] = ()) -> Any:
    state = made.init()
    for step in range(steps):
        batch = batch_of(16, seed=step, bad=step in bad)
        state = made.step(state, jax.device_put(batch, batch_sharding(made._mesh)))
    return state


def test_model_computes_in_the_configured_dtype() -> None:
    state = train(programs(Watched(), BF16), 1)
    assert {SEEN['x'], SEEN['hidden']} == {jnp.dtype('bfloat16')}
    assert {SEEN['kernel'], SEEN['logits']} == {jnp.dtype('float32')}
    # Neither batch statistics nor any other variable changes its dtype.
    kept = (state.params, state.opt_state[0].trace, state.collections)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype('float32')}


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        return x + nn.Dense(x.shape[-1])(x), None


class Scanned(nn.Module):
    """A scan over layers from its input, and one over positions from zeros of the same dtype."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        split = {'params': True}
        layers = nn.scan(Residual, variable_axes={'params': 0}, split_rngs=split, length=2)
        x, _ = layers()(x)

        def read(cell: nn.Module, state: jax.Array, x: jax.Array) -> Any:
            state = nn.tanh(cell(jnp.concatenate([state, x[:, None]], -1)))
            return state, None

        along = nn.scan(read, variable_broadcast='params', split_rngs={'params': False}, in_axes=1)
        x, _ = along(nn.Dense(4), jnp.zeros((len(x), 4), x.dtype), x)
        SEEN['state'] = x.dtype
        return x


@pytest.mark.parametrize('precision', [BF16, F16])
@pytest.mark.parametrize('bridged', [False, True])
def test_carry_of_a_scan_has_the_compute_dtype(precision: Precision, bridged: bool) -> None:
    """Also during initialization, where parameters are float32."""

    def wrap_linen(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.bridge.ToNNX(Scanned(), rngs=rngs)

    model = as_functional(wrap_linen if bridged else Scanned(), precision)

    def task(model: Any, batch: Any) -> jax.Array:
        return model(batch['x'])

    def run(batch: Any) -> Any:
        variables = model.init(task, batch, Keys(seed=0, mode='init'))
        first = SEEN['state']
        output = task(model.bind(variables, Keys(seed=0, mode='eval')), batch)
        assert (first, SEEN['state']) == (jnp.dtype('float32'), jnp.dtype(precision.compute))
        return variables['params'], output

    found = jax.eval_shape(run, batch_of())
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype('float32')}


def test_parameters_slots_and_average_dtypes() -> None:
    precision = Precision(params='bfloat16', compute='bfloat16', output='float32')
    state = train(programs(Watched(), precision, ema_decay=0.9), 2)
    assert {x.dtype for x in jax.tree.leaves((state.params, state.average))} == {
        jnp.dtype('bfloat16')
    }
    kept = (state.collections, state.ema, state.opt_state[0].trace)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype('float32')}


@pytest.mark.slow
def test_average_of_half_precision_parameters_is_float32() -> None:
    """In bfloat16, a thousandth of a small difference would be rounded away."""

    def course(dtype: str) -> Any:
        made = programs(Watched(), Precision(params=dtype), ema_decay=0.999)
        state = made.init()
        first = state.ema['Dense_0']['kernel']
        state = state.replace(params=jax.tree.map(lambda x: x + x.dtype.type(0.125), state.params))
        state = state.replace(ema=jax.tree.map(jnp.copy, state.ema))
        batch = jax.device_put(batch_of(), batch_sharding(made._mesh))
        for _ in range(50):
            state = made.step(state, batch)
        return float(jnp.abs(state.ema['Dense_0']['kernel'] - first).mean())

    assert course('bfloat16') == pytest.approx(course('float32'), rel=0.05)


@pytest.mark.parametrize('accumulate', [1, 4])
def test_accumulation_in_half_precision_is_float32(accumulate: int) -> None:
    """Gradients are summed in float32, and the state keeps its dtypes: one compilation."""
    precision = Precision(params='bfloat16', output='float32')
    optimizer = Optimizer(base=optax.adam(0.01))
    made = programs(Watched(), precision, optimizer=optimizer, accumulate=accumulate)
    state = train(made, 3)
    assert made.step.compiles == 1
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype('bfloat16')}
    slots = (state.opt_state[0].mu, state.opt_state[0].nu)
    assert {x.dtype for x in jax.tree.leaves(slots)} == {jnp.dtype('float32')}


def test_nothing_is_cast_by_default() -> None:
    train(programs(Watched(), Precision()), 1)
    assert {SEEN[name] for name in ('x', 'hidden', 'logits')} == {jnp.dtype('float32')}


@pytest.mark.slow
def test_overflow_keeps_the_state_and_halves_the_scale() -> None:
    """Parameters, optimizer state, average and statistics are kept; `step` increases."""
    adam = Optimizer(base=optax.adam(0.1), learning_rate=lambda count: count)
    made = programs(Watched(), loss_scale=2.0**10, ema_decay=0.5, optimizer=adam)
    before, after = train(made, 2), train(made, 3, bad=(2,))
    for name in ('params', 'opt_state', 'ema', 'collections'):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    assert (int(before.step), int(after.step)) == (2, 3)
    assert (float(before.loss_scale.scale), float(after.loss_scale.scale)) == (1024, 512)
    metrics = compute_metrics(after.metrics)
    assert (metrics['loss_scale'], metrics['skipped_updates']) == (512, 1)
    # The row of that step describes the parameters that were kept.
    kept = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(before.params)))
    assert metrics['norms']['param'] == pytest.approx(float(kept), rel=1e-6)
    assert metrics['norms']['update'] == 0 and not np.isfinite(metrics['norms']['grad'])
    # The schedule does not count the skipped update.
    later = train(made, 5, bad=(2,))
    assert compute_metrics(later.metrics)['learning_rate'] == 3
    assert later.opt_state[0].count == 4
    assert later.loss_scale.finite_steps == 2


def test_scale_doubles_after_2000_finite_steps() -> None:
    """An overflow restarts the count; the scale is never below 1 and never infinite."""
    scale = LossScale.from_value(65536.0)
    after = jax.jit(lambda s, finite: s.update(finite))
    for _ in range(1999):
        scale = after(scale, jnp.array(True))
    assert (float(scale.scale), int(scale.finite_steps)) == (65536, 1999)
    assert float(after(scale, jnp.array(True)).scale) == 131072
    assert int(after(scale, jnp.array(True)).finite_steps) == 0
    shrunk = after(scale, jnp.array(False))
    assert (float(shrunk.scale), int(shrunk.finite_steps), int(shrunk.skipped)) == (32768, 0, 1)
    assert float(after(LossScale.from_value(1.0), jnp.array(False)).scale) == 1
    ready = LossScale(jnp.float32(2.0**127), jnp.int32(1999), jnp.int32(0))
    assert float(after(ready, jnp.array(True)).scale) == 2.0**127


@pytest.mark.slow
@pytest.mark.parametrize('accumulate', [1, 4])
def test_scale_does_not_change_the_update(accumulate: int) -> None:
    """In float32, scaling by a power of two is exact: the parameters are bit-equal."""
    plain = train(programs(Watched(), Precision(), accumulate=accumulate))
    scaled = train(programs(Watched(), Precision(), accumulate=accumulate, loss_scale=2.0**12))
    # Without XLA's fusion emitters, two programs may fuse products and sums differently.
    exact = 'fusion_emitters=false' not in os.environ['XLA_FLAGS']
    rounding = {'rtol': 0.0, 'atol': 0.0 if exact else 1e-7}
    same = functools.partial(np.testing.assert_allclose, **rounding)
    jax.tree.map(same, plain.params, scaled.params)


def test_scale_prevents_underflow_in_float16() -> None:
    """Gradients of 1e-7 are 0 in float16 unless they are scaled."""

    def faint(model: Any, batch: Any) -> jax.Array:
        return 3e-8 * model(batch['x']).sum(-1)

    sgd = Optimizer(base=optax.sgd(1e6))
    options = dict(optimizer=sgd, task=TaskRunner.from_task(faint), seed=0)
    spec = {'x': jax.ShapeDtypeStruct((16, 8), jnp.float32)}
    batch = {'x': batch_of()['x']}
    mesh = make_mesh({'data': -1})

    def movement(scale: float | None) -> float:
        step = TrainStep(
            StepContext(model=as_functional(MLP((4,)), F16), loss_scale=scale, **options)
        )
        made = Programs(step, spec, mesh)
        before = jax.device_get(made.init().params)
        after = made.step(made.init(), jax.device_put(batch, batch_sharding(mesh))).params
        return float(optax.tree.norm(jax.tree.map(jnp.subtract, after, before))) / 1e6

    exact = 3e-8 * np.linalg.norm(np.r_[batch['x'].mean(0), 1.0]) * 2
    assert movement(None) < 0.5 * exact
    assert movement(2.0**20) == pytest.approx(exact, rel=0.01)


@pytest.mark.slow
def test_micro_batches_do_not_overflow_earlier_than_the_batch() -> None:
    """Cotangents are divided by the number of examples of the batch before they are summed."""

    def highest(accumulate: int) -> int:
        made = programs(Watched(), loss_scale=1.0, accumulate=accumulate)
        batch = jax.device_put(batch_of(), batch_sharding(made._mesh))
        for power in range(40):
            state = made.init().replace(loss_scale=LossScale.from_value(2.0**power))
            if made.step(state, batch).loss_scale.skipped:
                return power - 1
        raise AssertionError('no scale overflows')

    assert 10 < highest(1) <= highest(4) <= highest(1) + 2


@pytest.mark.parametrize('precision', slow_after(1, [BF16, F16]))
def test_sharded_run_equals_one_device(precision: Precision) -> None:
    """Two by four devices, parameters sharded over four, one overflow."""
    options: Any = dict(loss_scale=2.0**10, ema_decay=0.9)
    one = train(programs(Watched(), precision, **options), bad=(1,))
    cut = programs(Watched(), precision, mesh=EIGHT, sharding=(FSDP(min_bytes=1),), **options)
    many = train(cut, bad=(1,))
    kernel = many.params['Dense_0']['kernel']
    assert {s.data.shape for s in kernel.addressable_shards} == {(8, 4)}
    assert float(one.loss_scale.scale) == float(many.loss_scale.scale) == 512
    # Half precision rounds each of a few operations to 2^-8 or 2^-11, in a different order.
    tolerance = 0.05 if precision is BF16 else 0.01
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), one.params, many.params
    )


@pytest.mark.slow
def test_precision_from_config_to_checkpoint(tmp_path: pathlib.Path) -> None:
    def trainer(precision: str) -> Trainer:
        options = {
            'train_for': '6 steps',
            'data__source__limit': 640,
            'evals__test__data__source__limit': 100,
            'log__every': '2 steps',
            'precision': precision,
        }
        config = str(ROOT / 'configs' / 'mnist_mlp.py')
        return Trainer(load_and_build(config, **options), str(tmp_path))

    first = trainer("{'compute': 'float16'}").fit(max_steps=4)
    assert first.state.loss_scale.scale == 65536
    assert {'train/loss_scale', 'train/skipped_updates'} <= set(first.metrics)
    again = trainer("{'compute': 'float16'}")
    result = again.fit()
    assert (result.status, int(result.state.loss_scale.finite_steps)) == ('finished', 6)
    assert again.evaluate(result.state)['test']['examples'] == 100
    for off in ("{'compute': 'float16', 'loss_scale': 0}", "{'compute': 'bfloat16'}"):
        assert trainer(off).set_up().programs.abstract.loss_scale is None
