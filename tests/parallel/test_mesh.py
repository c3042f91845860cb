# SPDX-License-Identifier: Apache-2.0
"""One run on many meshes: the same losses with any sharding, and no array is ever assembled."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from jax.sharding import PartitionSpec as P

from tests.command import ROOT
from trainer.config.errors import UserError
from trainer.experiment import Experiment, load_and_build
from trainer.observe.table import bytes_per_device, nbytes
from trainer.run import checks
from trainer.trainer import Trainer

STEPS = 30
# The sums of a step are taken in another order on each mesh, and 30 steps of training amplify it.
TOLERANCE = 2e-5

MESHES = {
    '8 data': {'data': 8},
    '8 fsdp': {'fsdp': 8},
    '2 x 4': {'data': 2, 'model': 4},
    '2 x 2 x 2': {'data': 2, 'fsdp': 2, 'model': 2},
}
FSDP = {'target': 'trainer.sharding:FSDP', 'min_bytes': 2048}
CNN_BY_PATH = {
    'target': 'trainer.sharding:ByPath',
    'rules': (('Dense_0/kernel', ('fsdp', 'model')), ('Dense_1/kernel', ('model', None))),
}
NAMES = (
    ('batch', ('data', 'fsdp')), ('vocab', ('fsdp', 'model')), ('heads', 'model'),
    ('mlp', 'model'), ('embed', 'fsdp'),
)  # fmt: skip
BY_NAME = {'target': 'trainer.sharding:ByName', 'rules': NAMES}
LM_BY_PATH = {
    'target': 'trainer.sharding:ByPath',
    'rules': (
        ('.*/(query|key|value|mlp_in)/kernel', ('fsdp', 'model')),
        ('.*/(out|mlp_out)/kernel', ('model', 'fsdp')),
        ('tokens/embedding', (None, 'model')),
    ),
}


class NamedCNN(nn.Module):
    """A convolutional network that names dimensions of its dense layers and of activations."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def partition(*names: str | None) -> Any:
            return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)

        for features in (8, 16):
            x = nn.avg_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(64, kernel_init=partition('embed', 'mlp'))(x))
        x = nn.with_logical_constraint(x, ('batch', 'mlp'))
        return nn.Dense(10, kernel_init=partition('mlp', None))(x)


def experiment(kind: str, **options: Any) -> Experiment:
    common = {'train_for': f'{STEPS} steps', 'evals': {}, 'log__every': '1 steps'}
    common |= {'ema__decay': 0.9, 'checkpoint__every': 'never', 'log__tensorboard': False}
    if kind == 'lm':
        small = {'model__layers': 2, 'model__width': 64, 'model__max_length': 32}
        small |= {'data__source__seq_len': 32, 'data__source__limit': 512}
        return load_and_build(
            str(ROOT / 'configs' / 'lm.py:bytes'), **{**common, **small, **options}
        )
    small = {'data__source__limit': 960}
    if kind == 'cnn':
        small |= {'model__features': (8, 16), 'model__hidden': 64}
    else:
        small['model'] = {'target': kind if ':' in kind else f'{__name__}:{kind}'}
    return load_and_build(str(ROOT / 'configs' / 'mnist.py'), **{**common, **small, **options})


def with_mesh(base: Experiment, mesh: Mapping[str, int]) -> Experiment:
    # Over axes of size 1 nothing is sharded, so the same rules fit every mesh.
    devices = dataclasses.replace(base.devices, mesh={'data': 1, 'fsdp': 1, 'model': 1, **mesh})
    return dataclasses.replace(base, devices=devices)


def train(trainer: Trainer) -> tuple[Any, list[float]]:
    """Returns the state after 30 steps, and the loss of each."""
    assert trainer.workdir is not None
    state = trainer.fit().state
    lines = (trainer.workdir.path / 'metrics.jsonl').read_text().splitlines()
    return state, [json.loads(line)['train/loss'] for line in lines]


@pytest.fixture(scope='module')
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses on one device."""
    found = {}
    for kind in ('cnn', 'NamedCNN', 'lm'):
        names, auto = ('data', 'fsdp', 'model'), (jax.sharding.AxisType.Auto,) * 3
        mesh = jax.make_mesh((1, 1, 1), names, auto, devices=jax.devices()[:1])
        trainer = Trainer(experiment(kind), str(tmp_path_factory.mktemp(kind)), mesh=mesh)
        _, found[kind] = train(trainer)
        assert len(found[kind]) == STEPS
        assert found[kind][-1] < found[kind][0] - 0.1
    return found


CASES = [
    ('cnn', (CNN_BY_PATH, FSDP)),
    ('NamedCNN', (BY_NAME, FSDP)),
    ('lm', (BY_NAME,)),
    ('lm', (LM_BY_PATH, FSDP)),
]


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize(('kind', 'rules'), CASES, ids=['path', 'name', 'lm-name', 'lm-path'])
def test_the_loss_curve_is_that_of_one_device(
    kind: str, rules: Any, mesh: str, losses: dict[str, list[float]], tmp_path: pathlib.Path
) -> None:
    """Data, fully sharded and tensor parallelism differ only in rules."""
    placed = with_mesh(experiment(kind, sharding=rules), MESHES[mesh])
    trainer = Trainer(placed, str(tmp_path))
    state, found = train(trainer)
    assert found == pytest.approx(losses[kind], rel=TOLERANCE, abs=TOLERANCE)
    sizes = {'data': 1, 'fsdp': 1, 'model': 1, **MESHES[mesh]}
    is_sharded = sizes['fsdp'] * sizes['model'] > 1
    shards = [x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(state.params)]
    assert (min(shards) < 1) == is_sharded
    # Optimizer slots and average are sharded like their parameters.
    shapes = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, state.params)
    assert jax.tree.map(lambda x: x.addressable_shards[0].data.shape, state.ema) == shapes
    slots = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, dict))
    slots = [slot for slot in slots if isinstance(slot, dict)]
    assert slots
    for slot in slots:
        assert jax.tree.map(lambda x: x.addressable_shards[0].data.shape, slot) == shapes
    assert trainer.set_up().programs.step.compiles == 1


@pytest.fixture(scope='module')
def sharded_trainer() -> Trainer:
    """A transformer over 2 x 2 x 2 devices, not trained."""
    return Trainer(with_mesh(experiment('lm'), MESHES['2 x 2 x 2']))


def test_the_state_is_initialized_in_shards(sharded_trainer: Trainer) -> None:
    """Each leaf of the state has its spec, and each device has only its shards."""
    specs = jax.tree.map(lambda x: x.sharding.spec, sharded_trainer.set_up().programs.abstract)
    block = specs.params['block_0']
    assert block['mlp_in']['kernel'] == P('fsdp', 'model')
    assert block['mlp_out']['kernel'] == P('model', 'fsdp')
    assert specs.params['tokens']['embedding'] == P(('fsdp', 'model'), None)
    assert specs.ema == specs.params
    assert (specs.step, specs.metrics['norms']['grad'].value) == (P(), P())
    state = sharded_trainer.init_state()
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
        assert leaf.sharding.is_equivalent_to(
            jax.sharding.NamedSharding(sharded_trainer.set_up().mesh, spec), leaf.ndim
        )
    kernel = state.params['block_0']['mlp_in']['kernel']
    assert kernel.shape == (64, 256)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 128)}


def test_initialization_needs_no_whole_parameter(sharded_trainer: Trainer) -> None:
    """The program that creates the state needs little more memory than its shards."""
    analysis = sharded_trainer.set_up().programs.init.executable().memory_analysis()
    assert analysis is not None
    abstract = sharded_trainer.set_up().programs.abstract
    share = bytes_per_device(abstract)
    assert share < 0.4 * nbytes(abstract)
    assert analysis.output_size_in_bytes == pytest.approx(share, rel=0.01)
    assert analysis.temp_size_in_bytes < max(nbytes(leaf) for leaf in jax.tree.leaves(abstract))


class Stacked(nn.Module):
    """Scanned layers whose new dimension has a name; both kernels of a layer sharded."""

    width: int = 64
    hidden: int = 128
    named: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        names = {nn.PARTITION_NAME: None} if self.named else {}
        layers = nn.scan(
            Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=4,
            metadata_params=names,
        )  # fmt: skip
        x = jnp.resize(x, (len(x), self.width))
        x, _ = layers(self.hidden)(x, None)
        return nn.Dense(10)(x)


class Layer(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        init, width = nn.initializers.lecun_normal(), x.shape[-1]
        wide = self.param('w1', nn.with_partitioning(init, (None, 'model')), (width, self.hidden))
        back = self.param('w2', nn.with_partitioning(init, ('model', None)), (self.hidden, width))
        x = jax.lax.with_sharding_constraint(nn.relu(x @ wide), P('data', 'model'))
        return jax.lax.with_sharding_constraint(x @ back, P('data', None)), None


def layer_of(params: Any) -> Any:
    return next(value for name, value in params.items() if 'Layer' in name)


@pytest.mark.slow
def test_names_that_are_mesh_axes_need_no_rules(tmp_path: pathlib.Path) -> None:
    """`nn.with_partitioning`, scanned layers, constraints; checkpoints unboxed."""
    options = {'train_for': '3 steps', 'mesh__data': 2, 'mesh__model': 4}
    stacked = experiment('Stacked', **options, checkpoint__every='3 steps')
    trainer = Trainer(stacked, str(tmp_path))
    params = trainer.fit().state.params
    layer = layer_of(params)
    assert layer['w1'].shape == (4, 64, 128)
    assert layer['w1'].sharding.spec == P(None, None, 'model')
    assert layer['w2'].sharding.spec == P(None, 'model', None)
    assert {s.data.shape for s in layer['w1'].addressable_shards} == {(4, 64, 32)}
    again = Trainer(stacked, str(tmp_path)).restore()
    jax.tree.map(lambda a, b: (a == b).all() or pytest.fail('differs'), params, again.params)


def test_a_scanned_dimension_without_a_name_is_refused() -> None:
    """Flax asks for the name before anything is compiled."""
    model = {'target': f'{__name__}:Stacked', 'named': False}
    stacked = experiment('Stacked', mesh__data=2, mesh__model=4, model=model)
    with pytest.raises(errors.PartitioningUnspecifiedError, match='partition_name'):
        Trainer(stacked).compile()


@pytest.mark.slow
def test_the_network_of_the_guide_on_eight_devices() -> None:
    """Four layers of 1024 x 1024, scanned over, on 2 x 4 devices, each of which holds
    (4, 1024, 256) of a kernel and of its moments. (The guide times the step; no time is asserted.)
    """
    model = {'target': f'{__name__}:Stacked', 'width': 1024, 'hidden': 1024}
    adam = {'target': 'optax:adam', 'learning_rate': 1e-3}
    options = {'model': model, 'optimizer': adam, 'ema': None}
    trainer = Trainer(experiment('Stacked', mesh__data=2, mesh__model=4, **options))
    state = trainer.init_state()
    with trainer.batches(0, [1]) as batches:
        batch = next(iter(batches)).arrays
        state = jax.block_until_ready(trainer.set_up().programs.step(state, batch))
    assert state.step == 1
    assert math.isfinite(float(state.metrics['task'].loss.compute()))
    adam_state = next(x for x in jax.tree.leaves(
        state.opt_state, is_leaf=lambda x: hasattr(x, 'mu')) if hasattr(x, 'mu'))  # fmt: skip
    for tree in (state.params, adam_state.mu, adam_state.nu):
        w1, w2 = layer_of(tree)['w1'], layer_of(tree)['w2']
        assert w1.shape == w2.shape == (4, 1024, 1024)
        assert {part.data.shape for part in w1.addressable_shards} == {(4, 1024, 256)}
        assert {part.data.shape for part in w2.addressable_shards} == {(4, 256, 1024)}


@pytest.mark.slow
def test_a_missing_axis_is_named() -> None:
    with pytest.raises(UserError, match=r"names the mesh axis 'model'.*--config.mesh.model=1"):
        Trainer(experiment('Stacked')).compile()
    assert Trainer(experiment('Stacked', mesh__model=1)).init_state().step == 0


def test_an_unused_axis_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """An axis may have any name; a misspelled one must not silently repeat the work."""
    assert Trainer(experiment('cnn', mesh={'dada': 8})).set_up().programs.abstract
    assert 'config.mesh.dada=8: no parameter is sharded over this axis' in caplog.text
    caplog.clear()
    renamed = experiment('cnn', mesh={'rows': 8}, sharding={**FSDP, 'axis': 'rows'})
    assert Trainer(renamed).set_up().programs.abstract
    assert Trainer(with_mesh(experiment('lm'), MESHES['2 x 4'])).set_up().programs.abstract
    assert 'config.mesh' not in caplog.text


class Unnamed(nn.Module):
    """Two layers without names of dimensions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(64, name='one')(x.reshape(len(x), -1)))
        return nn.Dense(10, name='two')(x)


def test_wrong_gradients_of_xla_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Two axes of one size for a kernel, one more for the batch; see the next test."""
    rule = {
        'target': 'trainer.sharding:ByPath',
        'rules': (('one/kernel', ('fsdp', 'model')),),
    }
    for mesh, is_warned in (('2 x 2 x 2', True), ('8 fsdp', False), ('2 x 4', False)):
        trainer = Trainer(with_mesh(experiment('Unnamed', sharding=(rule,)), MESHES[mesh]))
        caplog.clear()
        checks.warn_of_wrong_gradients(trainer.set_up().programs.abstract, trainer.set_up().mesh)
        assert ('one/kernel is sharded over two mesh axes of size 2' in caplog.text) == is_warned


def test_xla_still_computes_wrong_gradients() -> None:
    """In JAX alone. Once this fails, remove `warn_of_wrong_gradients`."""
    mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'model'), (jax.sharding.AxisType.Auto,) * 3)
    rows = jax.NamedSharding(mesh, P(('data', 'fsdp')))

    def loss(kernels: Any, x: Any, names: bool) -> Any:
        for kernel in kernels:
            x = x + jax.nn.gelu(x @ kernel)
            x = jax.lax.with_sharding_constraint(x, rows) if names else x
        return (x**2).mean()

    keys = jax.random.split(jax.random.key(0), 3)
    x, *kernels = (jax.random.normal(key, (32, 32)) * 0.2 for key in keys)
    expected = jax.jit(jax.grad(lambda *args: loss(*args, names=False)))(kernels, x)
    sharded = [jax.NamedSharding(mesh, P('fsdp', 'model'))] * 2
    for names in (False, True):
        gradient = jax.jit(
            jax.grad(lambda *args, names=names: loss(*args, names=names)),
            in_shardings=(sharded, rows),
            out_shardings=sharded,
        )
        found = gradient(kernels, x)
        assert np.allclose(found[0], expected[0], rtol=1e-3, atol=1e-5) == names


def test_rules_are_checked_before_the_model_is_traced() -> None:
    rule = {'target': 'trainer.sharding:ByName', 'rules': (('mlp', 'nowhere'),)}
    with pytest.raises(UserError, match="the rule for 'mlp' names the mesh axis 'nowhere'"):
        Trainer(experiment('cnn', sharding=(rule,))).compile()


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['8 fsdp', '2 x 2 x 2'])
def test_float16_with_a_sharded_state(mesh: str, tmp_path: pathlib.Path) -> None:
    """After an overflow on any device, no shard changes, and the scale is halved."""
    options = {'precision': {'compute': 'float16', 'loss_scale': 2.0**30}, 'train_for': '16 steps'}
    rows = []
    for name, where in (('whole', {'data': 8}), ('sharded', MESHES[mesh])):
        placed = with_mesh(experiment('cnn', sharding=(CNN_BY_PATH, FSDP), **options), where)
        trainer = Trainer(placed, str(tmp_path / name))
        train(trainer)
        lines = (tmp_path / name / 'metrics.jsonl').read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
    whole, sharded = rows
    for key in ('train/loss_scale', 'train/skipped_updates'):
        assert [row[key] for row in sharded] == [row[key] for row in whole]
    skipped = sharded[-1]['train/skipped_updates']
    assert 5 < skipped < 16
    assert sharded[-1]['train/loss_scale'] == 2.0 ** (30 - skipped)
    # In float16 a sum that is taken in another order differs sooner than in float32.
    losses = [[row['train/loss'] for row in each] for each in rows]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[1][0] != losses[1][-1]
