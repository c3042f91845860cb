# SPDX-License-Identifier: Apache-2.0
"""The train step compared with handwritten mathematics, on one and on eight devices."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.marks import slow_except
from trainer.config.errors import UserError
from trainer.models.cnn import CNN
from trainer.models.mlp import MLP
from trainer.modules.functional import as_functional
from trainer.parallel.mesh import batch_sharding, make_mesh
from trainer.step.context import StepContext
from trainer.step.one_model import TrainStep
from trainer.step.optimizer import Optimizer
from trainer.step.programs import Programs
from trainer.tasks import Classification, TaskOutput
from trainer.tasks.runner import TaskRunner, compute_metrics

ROWS = 16
Mesh = jax.sharding.Mesh


def one_device_mesh() -> Mesh:
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), ('data',), devices=jax.devices()[:1], axis_types=axis_types)


def batch_of(rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        'image': rng.normal(size=(rows, 5, 4, 1)).astype(np.float32),
        'label': rng.integers(0, 10, rows).astype(np.int32),
    }


def programs(
    model: nn.Module,
    *,
    task: Any = None,
    mesh: Mesh | None = None,
    rows: int = ROWS,
    **options: Any,
) -> Programs:
    mesh = mesh or make_mesh({'data': -1})
    optimizer = options.pop('optimizer', Optimizer(base=optax.sgd(0.1, momentum=0.9)))
    train_step = TrainStep(
        StepContext(
            model=as_functional(model),
            task=TaskRunner.from_task(task or Classification()),
            optimizer=optimizer,
            seed=0,
            shards=mesh.size,
            **options,
        )
    )
    batch = {**batch_of(rows), **options.pop('extra', {})}
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    return Programs(train_step, spec, mesh)


def place(batch: dict[str, np.ndarray], mesh: Mesh | None = None) -> dict[str, jax.Array]:
    return jax.device_put(batch, batch_sharding(mesh or make_mesh({'data': -1})))


def assert_trees_close(a: Any, b: Any, **tolerance: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_one_update_equals_the_handwritten_update() -> None:
    """The mean gradient, optax's update, step + 1, one compilation."""
    model, tx = MLP((8, 10)), optax.sgd(0.1, momentum=0.9)
    program = programs(model, optimizer=Optimizer(base=tx))
    state = program.init()
    params, opt_state = jax.device_get(state.params), tx.init(jax.device_get(state.params))

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply({'params': params}, batch['image'])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

    @jax.jit
    def update(params: Any, opt_state: Any, batch: Any) -> Any:
        updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for seed in range(3):
        batch = batch_of(seed=seed)
        state = program.step(state, place(batch))
        params, opt_state = update(params, opt_state, batch)
    assert_trees_close(state.params, params, rtol=1e-5, atol=1e-6)
    assert int(state.step) == 3
    assert program.step.compiles == 1


@pytest.mark.slow
def test_metrics_are_means_over_all_steps() -> None:
    """Accumulated on the devices, weighted, equal to numpy's mean over the batches."""
    model = MLP((8, 10))
    program = programs(
        model, optimizer=Optimizer(base=optax.sgd(0.0), learning_rate=lambda s: 1.0 * s)
    )
    state = program.init()
    params = jax.device_get(state.params)
    hits, losses = [], []
    for seed in range(4):
        batch = batch_of(seed=seed)
        logits = model.apply({'params': params}, batch['image'])
        hits.append(np.mean(np.argmax(logits, -1) == batch['label']))
        losses.append(
            optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()
        )
        state = program.step(state, place(batch))
    metrics = compute_metrics(jax.device_get(state.metrics))
    assert metrics['task']['accuracy'] == pytest.approx(np.mean(hits))
    assert metrics['task']['loss'] == pytest.approx(np.mean(losses), rel=1e-5)
    # The rate of the last update, the fourth.
    assert metrics['learning_rate'] == 3.0
    assert metrics['norms']['param'] == pytest.approx(float(optax.tree.norm(params)), rel=1e-5)


@pytest.mark.parametrize('one_hot', [False, True])
def test_integer_and_one_hot_labels_agree(one_hot: bool) -> None:
    """Both equal the cross-entropy, with and without label smoothing."""

    def losses(smoothing: float) -> np.ndarray:
        batch = batch_of()
        model = lambda x: jnp.asarray(x).reshape(ROWS, -1)[:, :10]  # noqa: E731
        if one_hot:
            batch['label'] = np.eye(10, dtype=np.float32)[batch['label']]
        return np.asarray(Classification(label_smoothing=smoothing)(model, batch).loss)

    batch = batch_of()
    logits = batch['image'].reshape(ROWS, -1)[:, :10]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    plain = -log_p[np.arange(ROWS), batch['label']]
    np.testing.assert_allclose(losses(0.0), plain, rtol=1e-5)
    np.testing.assert_allclose(losses(0.1), 0.9 * plain - 0.1 * log_p.mean(-1), rtol=1e-5)


def test_top_k() -> None:
    task = Classification(top_k=(2,))
    batch = {
        'image': np.eye(4, dtype=np.float32) + 0.1 * np.arange(4),
        'label': np.array([0, 3, 2, 1]),
    }
    hits = task(lambda x: jnp.asarray(x), batch).metrics
    assert hits['accuracy'].tolist() == [True, False, True, False]
    assert hits['top2_accuracy'].tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ('devices', 'accumulate'), slow_except([(2, 2)], [(1, 2), (1, 4), (2, 2), (2, 4)])
)
def test_accumulation_is_exact_for_unequal_weights(accumulate: int, devices: int) -> None:
    """The update of 2 or 4 micro-batches of different weights is that of the whole batch."""
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh(
        (devices,), ('data',), devices=jax.devices()[:devices], axis_types=axis_types
    )

    def task(model: Any, batch: Any) -> TaskOutput:
        output = Classification()(model, batch)
        kernel = model.params['Dense_0']['kernel']
        weights = jnp.where(batch['label'] < 3, 0.1 + batch['label'], 0.0)
        return output.replace(weights=weights, penalties={'l2': 0.01 * jnp.sum(kernel**2)})

    def train(accumulate: int) -> Any:
        program = programs(MLP((8, 10)), task=task, mesh=mesh, accumulate=accumulate)
        state = program.init()
        for seed in range(3):
            state = program.step(state, place(batch_of(seed=seed), mesh))
        return jax.device_get((state.params, compute_metrics(state.metrics)))

    whole, accumulated = train(1), train(accumulate)
    assert_trees_close(whole[0], accumulated[0], rtol=1e-5, atol=1e-6)
    assert_trees_close(whole[1]['task'], accumulated[1]['task'], rtol=1e-5)
    assert_trees_close(whole[1]['penalties'], accumulated[1]['penalties'], rtol=1e-5)


def test_padding_does_not_count() -> None:
    """A padded batch gives the update of its real examples alone."""
    mesh = one_device_mesh()
    short = batch_of(5)
    padded = {
        k: np.concatenate([v, np.zeros((3, *v.shape[1:]), v.dtype)]) for k, v in short.items()
    }
    padded['_mask'] = np.arange(8) < 5

    def train(batch: dict[str, np.ndarray]) -> Any:
        step = TrainStep(
            StepContext(
                model=as_functional(MLP((8, 10))),
                task=TaskRunner.from_task(Classification()),
                optimizer=Optimizer(base=optax.sgd(0.1)),
                seed=0,
            )
        )
        spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
        program = Programs(step, spec, mesh)
        return jax.device_get(program.step(program.init(), place(batch, mesh)))

    a, b = train(short), train(padded)
    assert_trees_close(a.params, b.params, rtol=1e-6, atol=1e-7)
    assert_trees_close(a.metrics['task'], b.metrics['task'], rtol=1e-6)


def test_same_update_on_one_and_on_eight_devices() -> None:
    def train(mesh: Mesh) -> Any:
        program = programs(CNN(features=(4,), hidden=8), mesh=mesh)
        state = program.init()
        for seed in range(3):
            state = program.step(state, place(batch_of(seed=seed), mesh))
        return jax.device_get(state.params)

    assert_trees_close(
        train(one_device_mesh()), train(make_mesh({'data': -1})), rtol=1e-4, atol=1e-6
    )


def test_batch_norm_statistics_are_of_the_global_batch() -> None:
    """They are updated as one device would with the whole batch."""
    model = MLP((8, 10), batch_norm=True)
    program = programs(model)
    state = program.init()
    variables = jax.device_get(state.variables)
    batch = batch_of()
    _, updates = model.apply(variables, batch['image'], train=True, mutable=['batch_stats'])
    state = program.step(state, place(batch))
    assert_trees_close(
        state.collections['batch_stats'], updates['batch_stats'], rtol=1e-5, atol=1e-6
    )


def test_dropout_depends_on_seed_and_step_only() -> None:
    """The same step drops the same units in a second run, another step other units."""
    seen: list[Any] = []

    class Probe(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            x = nn.Dropout(0.5, deterministic=not train)(jnp.ones((x.shape[0], 10)))
            return x * self.param('scale', nn.initializers.ones, ())

    def task(model: Any, batch: Any) -> Any:
        out = model(batch['image'])
        return out.sum(-1), {'first': out[:, 0] * 2.0 ** jnp.arange(ROWS)}

    for _ in range(2):
        program = programs(Probe(), task=task, optimizer=Optimizer(base=optax.sgd(0.0)))
        state = program.init()
        for _ in range(2):
            state = program.step(state, place(batch_of()))
            seen.append(float(compute_metrics(jax.device_get(state.metrics))['task']['first']))
            state = state.replace(metrics=program.empty_metrics())
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]


def test_undeclared_rng_streams_and_collections() -> None:
    """A collection with another name; an RNG stream that was not declared."""

    class Counter(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            count = self.variable('counts', 'calls', lambda: jnp.zeros(()))
            if not self.is_initializing() and self.is_mutable_collection('counts'):
                count.value += 1
            noise = jax.random.normal(self.make_rng('noise'), (x.shape[0], 10))
            return nn.Dense(10)(x.reshape(x.shape[0], -1)) + noise

    program = programs(Counter())
    state = program.init()
    for _ in range(3):
        state = program.step(state, place(batch_of()))
    assert float(state.collections['counts']['calls']) == 3


def test_ema_follows_the_parameters() -> None:
    program = programs(MLP((8, 10)), ema_decay=0.9)
    state = program.init()
    expected = jax.device_get(state.params)
    for seed in range(3):
        state = program.step(state, place(batch_of(seed=seed)))
        expected = jax.tree.map(
            lambda e, p: 0.9 * e + 0.1 * p, expected, jax.device_get(state.params)
        )
    assert_trees_close(state.ema, expected, rtol=1e-5, atol=1e-6)


def test_steps_per_call_is_bit_equal_on_the_mlp() -> None:
    mesh = one_device_mesh()
    step = TrainStep(
        StepContext(
            model=as_functional(MLP((8, 10))),
            task=TaskRunner.from_task(Classification()),
            optimizer=Optimizer(base=optax.adam(0.01), learning_rate=lambda s: 0.01),
            seed=0,
        )
    )
    batches = [batch_of(seed=seed) for seed in range(4)]
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batches[0].items()}
    program = Programs(step, spec, mesh, fused=4)
    single = program.init()
    for batch in batches:
        single = program.step(single, place(batch, mesh))
    stacked = {name: np.stack([b[name] for b in batches]) for name in spec}
    fused = program.fused(
        program.init(), jax.device_put(stacked, batch_sharding(mesh, leading_dims=1))
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(single), jax.device_get(fused))


def test_optimizer_state_is_created_with_the_shardings_of_its_parameters() -> None:
    program = programs(MLP((8, 10)), optimizer=Optimizer(base=optax.adam(0.1)))
    state = program.init()
    for slot in (state.opt_state[0].mu, state.opt_state[0].nu):
        jax.tree.map(lambda p, s: p.sharding == s.sharding or pytest.fail(), state.params, slot)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    after = program.step(state, place(batch_of()))
    assert jax.tree.map(lambda x: x.sharding, after) == shardings


def test_changed_argument_is_named_when_a_program_compiles_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = programs(MLP((8, 10)), mesh=one_device_mesh())
    state = program.step(program.init(), place(batch_of(), one_device_mesh()))
    program.step(state, place(batch_of(8), one_device_mesh()))
    assert '1/image: float32[16, 5, 4, 1] -> float32[8, 5, 4, 1]' in caplog.text
    assert program.step.compiles == 2


def test_programs_are_traced_with_the_settings_of_the_caller() -> None:
    """Settings of JAX are per thread, and can be limited to a `with` block."""
    seen = []

    def task(model: Any, batch: Any) -> Any:
        seen.append(jax.config.jax_default_matmul_precision)
        return Classification()(model, batch)

    with jax.default_matmul_precision('highest'):
        program = programs(MLP((8, 10)), task=task, mesh=one_device_mesh())
        program.step.executable()
    assert set(seen) == {'highest'}


class OnlyInTraining(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.reshape(len(x), -1)
        return nn.Dense(10, name='more' if train else 'less')(x)


def test_module_created_only_in_training_is_an_error() -> None:
    with pytest.raises(UserError, match=r'was not created by initialization(.|\n)*"/more"'):
        programs(OnlyInTraining(), mesh=one_device_mesh()).step.executable()


def test_task_that_returns_a_mean_is_rejected() -> None:
    with pytest.raises(UserError, match='returned a scalar'):
        programs(MLP((8, 10)), task=lambda model, batch: model(batch['image']).mean()).init()
