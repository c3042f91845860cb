# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters, each with its own optimizer and loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.step import gan
from trainer.config.errors import UserError
from trainer.models.mlp import MLP
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys
from trainer.parallel.mesh import batch_sharding, make_mesh
from trainer.step.context import StepContext
from trainer.step.one_model import TrainStep
from trainer.step.optimizer import Group, Optimizer
from trainer.step.programs import Programs
from trainer.tasks import Classification, TaskOutput
from trainer.tasks.runner import TaskRunner, compute_metrics

ROWS = 16
GEN, DISC = optax.adam(0.01, b1=0.5), optax.sgd(0.1, momentum=0.9)


def group(params: str, tx: Any, loss: str | None = None, **options: Any) -> Group:
    return Group(params=(params,), optimizer=Optimizer(base=tx, **options), loss=loss)


def two_players(**options: Any) -> Optimizer:
    groups = {
        'gen': group('generator/.*', GEN, 'gen'),
        'disc': group('discriminator/.*', DISC, 'disc'),
    }
    return Optimizer(groups=groups, **options)


def points(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {'x': (gan.CENTRE + 0.3 * rng.normal(size=(ROWS, 2))).astype(np.float32)}


def programs(
    optimizer: Optimizer, *, task: Any = gan.task, model: Any = None, devices: int = 1,
    batch: Any = None, fused: int = 1, **options: Any,
) -> Programs:  # fmt: skip
    mesh = mesh_of(devices)
    step = TrainStep(
        StepContext(
            model=as_functional(model or gan.GAN()),
            task=TaskRunner.from_task(task),
            optimizer=optimizer,
            seed=0,
            shards=devices,
            **options,
        )
    )
    batch = points() if batch is None else batch
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    return Programs(step, spec, mesh, fused=fused)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    if devices == jax.device_count():
        return make_mesh({'data': -1})
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh(
        (devices,), ('data',), devices=jax.devices()[:devices], axis_types=axis_types
    )


def train(program: Programs, steps: int, devices: int = 1) -> Any:
    state, sharding = program.init(), batch_sharding(mesh_of(devices))
    for seed in range(steps):
        state = program.step(state, jax.device_put(points(seed), sharding))
    return jax.device_get(state)


def assert_trees_close(a: Any, b: Any, **tolerance: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def params_by_hand(params: Any, steps: int) -> Any:
    """Returns the parameters after steps by hand; both gradients are taken before the step."""
    net, tx = gan.Net, {'generator': GEN, 'discriminator': DISC}
    slots = {name: tx[name].init(params[name]) for name in tx}

    def play(gen: Any, disc: Any, x: Any, z: Any) -> tuple[jax.Array, jax.Array]:
        fake = net(2).apply({'params': gen}, z)
        logits = [net(1).apply({'params': disc}, points)[:, 0] for points in (x, fake)]
        gen_loss, disc_loss = gan.losses(*logits)
        return gen_loss.mean(), disc_loss.mean()

    for step in range(steps):
        key = Keys(seed=0, mode='train', step=step).stream('latent')
        x, z = points(step)['x'], jax.random.normal(key, (ROWS, gan.LATENT))
        g, d = params['generator'], params['discriminator']
        grads = {
            'generator': jax.grad(lambda g: play(g, d, x, z)[0])(g),  # noqa: B023
            'discriminator': jax.grad(lambda d: play(g, d, x, z)[1])(d),  # noqa: B023
        }
        for name, transformation in tx.items():
            updates, slots[name] = transformation.update(grads[name], slots[name], params[name])
            params = {**params, name: optax.apply_updates(params[name], updates)}
    return params


@pytest.mark.slow
def test_two_losses_equal_the_handwritten_step() -> None:
    """Each loss changes its own parameters, with its own optimizer, and no others."""
    program = programs(two_players())
    start = jax.device_get(program.init().params)
    after = train(program, 5)
    assert_trees_close(after.params, params_by_hand(start, 5), rtol=1e-5, atol=1e-6)
    assert program.step.compiles == 1


@pytest.mark.slow
def test_zero_learning_rate_of_one_group_leaves_its_parameters_unchanged() -> None:
    """The parameters of the other group learn."""
    still = Optimizer(
        groups={**two_players().groups, 'gen': group('generator/.*', optax.sgd(0.0), 'gen')}
    )
    program = programs(still)
    start = jax.device_get(program.init().params)
    after = train(program, 3).params
    jax.tree.map(np.testing.assert_array_equal, after['generator'], start['generator'])
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), after, start)))


@pytest.mark.slow
def test_gan_learns_the_distribution() -> None:
    disc = group('discriminator/.*', GEN, 'disc')
    program = programs(Optimizer(groups={**two_players().groups, 'disc': disc}))
    state, sharding = program.init(), batch_sharding(mesh_of(1))
    distances = []
    for _ in range(4):
        state = state.replace(metrics=program.empty_metrics())
        for seed in range(100):
            state = program.step(state, jax.device_put(points(seed), sharding))
        distances.append(float(compute_metrics(jax.device_get(state.metrics))['task']['distance']))
    assert distances[-1] < 0.5 * distances[0], distances


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 2])
def test_accumulation_is_exact_for_losses_with_different_weights(devices: int) -> None:
    def task(model: Any, batch: Any) -> TaskOutput:
        # Without random numbers, which differ between micro-batches.
        fake = model.generator(jnp.tile(batch['x'], 2))
        real_logits = model.discriminator(batch['x'])[:, 0]
        gen, disc = gan.losses(real_logits, model.discriminator(fake)[:, 0])
        weights = {'gen': jnp.abs(batch['x'][:, 0]), 'disc': batch['x'][:, 1] > -1.0}
        kernel = model.params['generator']['Dense_0']['kernel']
        return TaskOutput(
            loss={'gen': gen, 'disc': disc},
            weights=weights,
            metrics={'distance': jnp.linalg.norm(fake - gan.CENTRE, axis=-1)},
            penalties={'l2': 0.01 * jnp.sum(kernel**2)},
        )

    def run(accumulate: int) -> Any:
        program = programs(two_players(), task=task, devices=devices, accumulate=accumulate)
        state = train(program, 3, devices)
        return state.params, compute_metrics(state.metrics)

    (whole, metrics), (accumulated, accumulated_metrics) = run(1), run(4)
    assert_trees_close(whole, accumulated, rtol=1e-5, atol=1e-6)
    del metrics['norms'], accumulated_metrics['norms']
    assert_trees_close(metrics, accumulated_metrics, rtol=1e-5)
    assert set(metrics['task']) == {'gen_loss', 'disc_loss', 'distance'}


def test_named_losses_are_averaged_by_their_own_weights() -> None:
    """Shared weights also apply to the metrics; padding does not count."""
    batch = {'x': np.arange(4.0, dtype=np.float32), '_mask': np.array([1, 1, 1, 0], bool)}

    def measure(weights: Any) -> Any:
        def task(model: Any, batch: Any) -> TaskOutput:
            loss = {'a': batch['x'], 'b': 10 * batch['x']}
            return TaskOutput(loss=loss, weights=weights, metrics={'m': batch['x']})

        runner = TaskRunner.from_task(task)
        return runner.measure(runner(None, batch)).compute()

    two = np.array([0.0, 1.0, 3.0, 5.0], np.float32)
    assert measure(None) == {'a_loss': 1.0, 'b_loss': 10.0, 'm': 1.0}
    assert measure(two) == {'a_loss': 1.75, 'b_loss': 17.5, 'm': 1.75}
    assert measure({'a': two}) == {'a_loss': 1.75, 'b_loss': 10.0, 'm': 1.0}
    assert measure({'b': two, 'metrics': two}) == {'a_loss': 1.0, 'b_loss': 17.5, 'm': 1.75}


@pytest.mark.slow
def test_groups_are_equal_on_one_and_eight_devices() -> None:
    one, eight = (train(programs(two_players(), devices=n), 3, n) for n in (1, 8))
    assert_trees_close(one.params, eight.params, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_fused_steps_with_groups_are_bit_equal() -> None:
    program = programs(two_players(clip_norm=0.5), fused=4, ema_decay=0.9)
    stacked = {'x': np.stack([points(seed)['x'] for seed in range(4)])}
    sharding = batch_sharding(mesh_of(1), leading_dims=1)
    fused = jax.device_get(program.fused(program.init(), jax.device_put(stacked, sharding)))
    single = train(program, 4)
    jax.tree.map(np.testing.assert_array_equal, single, fused)


@pytest.mark.slow
def test_groups_with_one_loss_equal_optax() -> None:
    """Two optimizers, one of them with clipping and multipliers."""
    adamw = optax.adamw(0.01, weight_decay=0.1)
    optimizer = Optimizer(
        groups={
            'first': group('Dense_0/.*', adamw, clip_norm=0.01),
            'rest': group('Dense_1/.*', DISC, lr_multipliers=(('.*/bias', 0.0), ('.*', 1.0))),
        }
    )
    batch = {
        'image': np.random.default_rng(0).normal(size=(ROWS, 6)).astype(np.float32),
        'label': np.arange(ROWS, dtype=np.int32) % 10,
    }
    model = MLP((8, 10))
    program = programs(optimizer, task=Classification(), model=model, batch=batch)
    state = program.init()
    params = jax.device_get(state.params)
    tx = {'Dense_0': optax.chain(optax.clip_by_global_norm(0.01), adamw), 'Dense_1': DISC}
    slots = {name: tx[name].init(params[name]) for name in tx}

    def loss(params: Any) -> jax.Array:
        logits = model.apply({'params': params}, batch['image'])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

    bias = params['Dense_1']['bias']
    for _ in range(3):
        state = program.step(state, batch)
        grads = jax.grad(loss)(params)
        for name in tx:
            updates, slots[name] = tx[name].update(grads[name], slots[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        params['Dense_1']['bias'] = bias
    assert_trees_close(state.params, params, rtol=1e-5, atol=1e-6)
    assert set(compute_metrics(jax.device_get(state.metrics))['task']) == {'loss', 'accuracy'}


@pytest.mark.slow
def test_frozen_parameters_need_no_group() -> None:
    optimizer = Optimizer(
        groups={'disc': two_players().groups['disc'], 'gen': group('.*/Dense_1/.*', GEN, 'gen')},
        freeze=('generator/Dense_0/.*',),
    )
    with pytest.raises(UserError, match=r'In several: discriminator/Dense_1/bias \(disc, gen\)'):
        programs(optimizer)
    optimizer = Optimizer(
        groups={**optimizer.groups, 'gen': group('generator/Dense_1/.*', GEN, 'gen')},
        freeze=('generator/Dense_0/.*',),
    )
    shapes = programs(optimizer).abstract.params
    ones = jax.tree.map(lambda x: np.ones(x.shape), shapes)
    chosen = optimizer.select({'disc': ones, 'gen': jax.tree.map(lambda x: 2 * x, ones)})
    expected = {'Dense_0': 0.0, 'Dense_1': 2.0}
    assert {name: x['bias'][0] for name, x in chosen['generator'].items()} == expected
    assert chosen['discriminator']['Dense_0']['bias'][0] == 1.0
    for accumulate in (1, 2):
        program = programs(optimizer, accumulate=accumulate)
        start = jax.device_get(program.init().params['generator'])
        after = train(program, 2)
        jax.tree.map(
            np.testing.assert_array_equal, after.params['generator']['Dense_0'], start['Dense_0']
        )
        assert (after.params['generator']['Dense_1']['bias'] != start['Dense_1']['bias']).all()
        # Two moments and a count of Adam for the last layer, the momentum of the other group.
        sizes = sum(x.size for x in jax.tree.leaves(after.opt_state))
        assert sizes == 2 * (16 * 2 + 2) + 1 + (2 * 16 + 16 + 16 + 1)


def test_task_may_return_only_a_dict_of_losses() -> None:
    output = TaskRunner.from_task(lambda model, batch: {'a': jnp.ones(2)})(None, {})
    assert set(output.loss) == {'a'}
