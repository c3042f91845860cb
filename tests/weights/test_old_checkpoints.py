# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of `flax.training`, of Flax before Linen, and of other layouts of Orbax."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training import checkpoints, train_state

from tests import command
from tests.parallel.group import finish, free_port
from tests.weights.examples import Net, assert_same, flatten, trainer
from trainer.config.errors import UserError
from trainer.models.cnn import CNN
from trainer.weights import restore, safetensors

X = jnp.ones((2, 28, 28, 1))


class State(train_state.TrainState):
    batch_stats: Any = None


class ConvNet(nn.Module):
    """Numbered by class: Conv_0, BatchNorm_0, Conv_1, BatchNorm_1, Dense_0."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for features in (4, 8):
            x = nn.Conv(features, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(3)(x.mean((1, 2)))


# Before Linen the children of ConvNet were counted together.
BEFORE = {
    'Conv_0': 'Conv_0', 'BatchNorm_0': 'BatchNorm_1', 'Conv_1': 'Conv_2',
    'BatchNorm_1': 'BatchNorm_3', 'Dense_0': 'Dense_4',
}  # fmt: skip


def net_state(seed: int = 0) -> State:
    """A state of `flax.training` of the small model, after one step."""
    model = Net()
    variables = model.init(jax.random.key(seed), jnp.ones((2, 8)))
    state = State.create(apply_fn=model.apply, tx=optax.adam(0.1), **variables)
    grads = jax.tree.map(jnp.ones_like, state.params)
    stats = jax.tree.map(lambda x: x + seed + 1, state.batch_stats)
    return state.apply_gradients(grads=grads, batch_stats=stats).replace(step=jnp.int32(1))


def pre_linen(variables: Any) -> dict[str, Any]:
    """The state dict of a training state of `flax.nn` and `flax.optim`, with a flat collection."""
    named = {name: {BEFORE[k]: x for k, x in tree.items()} for name, tree in variables.items()}
    return {
        'optimizer': {'target': {'params': named['params']}, 'state': {'step': np.array(7)}},
        'model_state': {f'/{name}': x for name, x in named['batch_stats'].items()},
        'step': np.array(7),
    }


@pytest.fixture
def msgpack() -> Any:
    before = flax.config.flax_use_orbax_checkpointing
    flax.config.update('flax_use_orbax_checkpointing', False)
    yield
    flax.config.update('flax_use_orbax_checkpointing', before)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_directory_of_flax_checkpoints(tmp_path: pathlib.Path, msgpack: None) -> None:
    """Numbers are compared as numbers, '10' after '9'; a run takes all variables."""
    states = {step: net_state(step) for step in (1, 9, 10)}
    for step, state in states.items():
        checkpoints.save_checkpoint(tmp_path / 'old', state, step, keep=9)
    for step, chosen in ((10, 'latest'), (9, 9), (1, '1')):
        init_from = {'path': str(tmp_path / 'old'), 'step': chosen}
        new = trainer(tmp_path, init_from=init_from).init_state()
        assert_same(new.params, states[step].params)
        assert_same(new.collections['batch_stats'], states[step].batch_stats)
    one = {'path': str(tmp_path / 'old' / 'checkpoint_9')}
    assert_same(trainer(tmp_path, init_from=one).init_state().params, states[9].params)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_fractional_steps(tmp_path: pathlib.Path, msgpack: None) -> None:
    """Steps sort as numbers: -1.0 before 0.001 before .01 before 1e5, under any prefix."""
    steps = (-1.0, 1e-5, 0.001, 0.01, 0.1, 1.0, 1e5)
    for step in steps:
        checkpoints.save_checkpoint(tmp_path, {'x': np.float32(step)}, step, 'ckpt_', keep=9)
        assert restore.raw(tmp_path)['x'] == np.float32(step)
    for step in steps:
        assert restore.raw(tmp_path, step)['x'] == np.float32(step)


@pytest.mark.slow
def test_flax_checkpoints_that_orbax_wrote(tmp_path: pathlib.Path) -> None:
    """Later versions of the same function write directories of Orbax."""
    state = net_state()
    checkpoints.save_checkpoint(tmp_path / 'old', state, 3, keep=9)
    new = trainer(tmp_path, init_from={'path': str(tmp_path / 'old'), 'step': 3}).init_state()
    assert_same(new.params, state.params)


@pytest.mark.slow
def test_other_layouts_of_orbax(tmp_path: pathlib.Path) -> None:
    """A state beside other values, bare parameters, a manager's step, strings."""
    state = net_state()
    whole = {'model': state, 'config': {'dims': np.array([5, 3]), 'name': 'dense'},
             'data': [jnp.arange(4)]}  # fmt: skip
    ocp.PyTreeCheckpointer().save(tmp_path / 'whole', whole)
    ocp.PyTreeCheckpointer().save(tmp_path / 'variables', {
        'params': {'params': state.params, 'batch_stats': state.batch_stats}})  # fmt: skip
    with ocp.CheckpointManager(tmp_path / 'manager') as manager:
        for step in (1, 2):
            tree = {'params': state.params, 'batch_stats': state.batch_stats}
            manager.save(step, args=ocp.args.StandardSave(tree))
    sharded = {'mesh': {'fsdp': 4}, 'sharding': (
        {'target': 'trainer.sharding:FSDP', 'min_bytes': 64},)}  # fmt: skip
    for init_from in ({'path': 'whole', 'at': 'model'}, {'path': 'variables'}, {'path': 'manager'},
                      {'path': 'manager/1'}):  # fmt: skip
        init_from['path'] = str(tmp_path / init_from['path'])
        new = trainer(tmp_path, init_from=init_from, **sharded).init_state()
        assert_same(new.params, state.params)
        assert_same(new.collections['batch_stats'], state.batch_stats)
    with pytest.raises(UserError, match=r"nothing at 'modle' in the checkpoint, which contains\n"):
        path = str(tmp_path / 'whole')
        trainer(tmp_path, init_from={'path': path, 'at': 'modle'}).init_state()
    ocp.PyTreeCheckpointer().save(tmp_path / 'bare', state.params)
    with pytest.raises(UserError, match='Missing:\n  batch_stats'):
        trainer(tmp_path, init_from={'path': str(tmp_path / 'bare')}).init_state()


def test_before_linen(tmp_path: pathlib.Path) -> None:
    """A training state with the weights of a pre-Linen checkpoint; same logits."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
    model = ConvNet()
    variables = dict(model.init(jax.random.key(1), x))
    variables['batch_stats'] = jax.tree.map(lambda s: s + 0.3, variables['batch_stats'])
    file = tmp_path / 'checkpoint_7'
    file.write_bytes(serialization.msgpack_serialize(jax.device_get(pre_linen(variables))))

    loaded = restore.model_variables(file, before_linen=True)
    assert_same(loaded, variables)
    fresh = model.init(jax.random.key(2), x)
    state = State.create(apply_fn=model.apply, tx=optax.adam(0.1), **fresh)
    state = state.replace(**loaded)
    logits = state.apply_fn({'params': state.params, 'batch_stats': state.batch_stats}, x)
    np.testing.assert_array_equal(logits, model.apply(variables, x))
    # What flax itself makes of the parameters.
    theirs = checkpoints.convert_pre_linen(pre_linen(variables)['optimizer']['target']['params'])
    assert_same(loaded['params'], theirs)


@pytest.mark.slow
def test_a_run_from_before_linen(tmp_path: pathlib.Path) -> None:
    """`layout='pre_linen'` in a config loads the parameters of the old model."""
    cnn = CNN(hidden=16)
    params = cnn.init(jax.random.key(1), X)['params']
    before = {'Conv_0': 'Conv_0', 'Conv_1': 'Conv_1', 'Dense_0': 'Dense_2', 'Dense_1': 'Dense_4'}
    old = {'optimizer': {'target': {before[k]: x for k, x in params.items()}}}
    file = tmp_path / 'old.msgpack'
    file.write_bytes(serialization.msgpack_serialize(jax.device_get(old)))
    options = {
        'model': {'target': 'trainer.models.cnn:CNN', 'hidden': 16},
        'data__source': {'target': 'trainer.data.mnist:MNIST', 'split': 'train', 'limit': 64},
        'data__device_transforms': ({'target': 'trainer.data.transforms:ToFloat'},),
    }
    init_from = {'path': str(file), 'layout': 'pre_linen'}
    state = trainer(tmp_path, init_from=init_from, **options).init_state()
    assert_same(state.params, params)
    with pytest.raises(UserError, match=r'Missing:\n  params/Dense_0/bias'):
        trainer(tmp_path, init_from={'path': str(file)}, **options).init_state()


def test_raw_without_a_target(tmp_path: pathlib.Path) -> None:
    """Everything that was saved, as its library restores it, as numpy arrays."""
    state = net_state()
    tree = {'model': state, 'data': [jnp.arange(10), np.arange(3.0)], 'name': 'net'}
    ocp.PyTreeCheckpointer().save(tmp_path / 'orbax', tree)
    raw = restore.raw(tmp_path / 'orbax')
    np.testing.assert_array_equal(raw['data'][0], np.arange(10))
    assert type(raw['data'][0]) is np.ndarray
    assert raw['name'] == 'net'
    assert_same(raw['model']['params'], state.params)
    assert_same(restore.raw(tmp_path / 'orbax', at='model/opt_state/0/mu'), state.opt_state[0].mu)
    with pytest.raises(UserError, match="has no 'mdoel' of 'mdoel/params'; available:\n  data"):
        restore.raw(tmp_path / 'orbax', at='mdoel/params')


@pytest.mark.parametrize(
    ('tx', 'expected'),
    [
        (optax.sgd(0.1), [None, None]),
        (optax.sgd(0.1, momentum=0.9), [{'trace': {'w': 0.0}}, None]),
        (optax.adam(0.1), [{'count': 0, 'mu': {'w': 0.0}, 'nu': {'w': 0.0}}, None]),
    ],
    ids=['sgd', 'momentum', 'adam'],
)
def test_the_raw_state_of_an_optimizer(tx: Any, expected: Any, tmp_path: pathlib.Path) -> None:
    """Orbax restores named tuples as dicts and empty ones as None, in a list."""
    ocp.PyTreeCheckpointer().save(tmp_path / 'orbax', {'opt_state': tx.init({'w': jnp.zeros(())})})
    found = restore.raw(tmp_path / 'orbax')['opt_state']
    assert jax.tree.map(float, found) == expected


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('orbax', [False, True])
def test_multiprocess_checkpoints_of_flax(
    orbax: bool, tmp_path: pathlib.Path, msgpack: None
) -> None:
    """`save_checkpoint_multiprocess` with sharded arrays, in the formats of Flax and of Orbax;
    a run starts from the checkpoint."""
    flax.config.update('flax_use_orbax_checkpointing', orbax)
    state = net_state()
    mesh = jax.make_mesh((4,), ('x',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    sharded = jax.tree.map(lambda x: jax.device_put(x, rows) if x.ndim == 2 else x, state.params)
    checkpoints.save_checkpoint_multiprocess(tmp_path / 'old', state.replace(params=sharded), 5)
    new = trainer(tmp_path, init_from={'path': str(tmp_path / 'old')}).init_state()
    assert_same(new.params, state.params)
    assert_same(new.collections['batch_stats'], state.batch_stats)
    assert restore.raw(tmp_path / 'old')['step'] == 1


PROGRAM = """
import sys
import jax
import numpy as np
from flax.training import checkpoints

coordinator, number, directory = sys.argv[1:]
jax.distributed.initialize(coordinator, 2, int(number))
mesh = jax.make_mesh((4,), ('x',), (jax.sharding.AxisType.Auto,))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
values = np.arange(32, dtype='f4').reshape(8, 4)
w = jax.make_array_from_callback(values.shape, rows, lambda index: values[index])
assert not w.is_fully_addressable
checkpoints.save_checkpoint_multiprocess(directory, {'params': {'w': w}}, 5)
"""


@pytest.mark.slow
def test_a_checkpoint_of_two_processes(tmp_path: pathlib.Path) -> None:
    """Each of two processes saves half of an array; one process reads all of it."""
    flags = {'XLA_FLAGS': command.xla_flags(2), 'JAX_PLATFORMS': 'cpu'}
    arguments = (f'127.0.0.1:{free_port()}', str(tmp_path / 'old'))
    running = [
        subprocess.Popen(
            [sys.executable, '-c', PROGRAM, arguments[0], str(number), arguments[1]],
            env={**os.environ, **flags}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    codes, _, errors = finish(running)
    assert codes == [0, 0], errors
    values = np.arange(32, dtype='f4').reshape(8, 4)
    np.testing.assert_array_equal(restore.raw(tmp_path / 'old', at='params/w'), values)


def test_editing_a_raw_checkpoint(tmp_path: pathlib.Path) -> None:
    """Flax restores a state from the edited dict."""
    state, file = net_state(), tmp_path / 'state.msgpack'
    file.write_bytes(serialization.to_bytes(state))
    raw = restore.raw(file)
    assert set(raw['opt_state']) == {'0', '1'} and raw['opt_state']['1'] == {}
    raw['batch_stats'] = jax.tree.map(np.flip, raw['batch_stats'])
    edited = serialization.from_state_dict(net_state(4), raw)
    assert_same(edited.batch_stats, jax.tree.map(np.flip, state.batch_stats))
    assert_same(edited.opt_state[0].mu, state.opt_state[0].mu)
    tensors = tmp_path / 'params.safetensors'
    safetensors.write(tensors, flatten(state.params))
    assert_same(restore.raw(tensors, at='head'), state.params['head'])


def test_into_a_dataclass(tmp_path: pathlib.Path) -> None:
    """The target gives structure, functions and shardings; its values do not matter."""
    state, target = net_state(), net_state(5)
    ocp.PyTreeCheckpointer().save(tmp_path / 'orbax', {'model': state})
    mesh = jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:4])  # fmt: skip
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = jax.device_put(target, replicated)
    found = restore.into(target, tmp_path / 'orbax', at='model')
    assert type(found) is State
    assert found.apply_fn is target.apply_fn and found.tx is target.tx
    assert_same(found, state)
    assert all(x.sharding == replicated for x in jax.tree.leaves(found.params))
    file = tmp_path / 'state.msgpack'
    file.write_bytes(serialization.to_bytes(state))
    assert_same(restore.into(target, file), state)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_into_a_target_with_strings(tmp_path: pathlib.Path, msgpack: None) -> None:
    """The target of the guide: a state, a config with a string, a list of arrays."""
    state, target = net_state(), net_state(5)
    saved = {'model': state, 'config': {'dims': np.array([5, 3]), 'name': 'dense'},
             'data': [jnp.arange(4)]}  # fmt: skip
    ocp.PyTreeCheckpointer().save(tmp_path / 'orbax', saved)
    checkpoints.save_checkpoint(tmp_path / 'flax', saved, 1)
    whole = {'model': target, 'config': {'dims': np.zeros(2, int), 'name': ''},
             'data': [jnp.zeros(4, int)]}  # fmt: skip
    for path in (tmp_path / 'orbax', tmp_path / 'flax'):
        found = restore.into(whole, path)
        assert found['config']['name'] == 'dense' and type(found['config']['name']) is str
        assert_same({**found, 'config': 0}, {**saved, 'config': 0})
        with pytest.raises(UserError, match=r'name: got <U5\[\], the target has float64\[\]'):
            restore.into({'config': {'name': 1.0, 'dims': 'x'}}, path)
        with pytest.raises(UserError, match=r'missing from .*:\n  config/nmae\n'):
            restore.into({'config': {'nmae': ''}}, path)


def test_a_single_array(tmp_path: pathlib.Path) -> None:
    """Saved by the handler for arrays, and as a tree of one leaf."""
    array = ocp.Checkpointer(ocp.ArrayCheckpointHandler())
    array.save(tmp_path / 'handler', args=ocp.args.ArraySave(jnp.arange(10)))
    ocp.PyTreeCheckpointer().save(tmp_path / 'tree', jnp.arange(10))
    for path in (tmp_path / 'handler', tmp_path / 'tree'):
        raw = restore.raw(path)
        np.testing.assert_array_equal(raw, np.arange(10))
        assert type(raw) is np.ndarray
        np.testing.assert_array_equal(restore.into(jnp.zeros(10, int), path), np.arange(10))


@pytest.mark.slow
def test_items_of_a_step(tmp_path: pathlib.Path) -> None:
    """A single tree is used whatever its name; one of two has to be named."""
    state = net_state()
    tree = ocp.args.StandardSave({'params': state.params, 'batch_stats': state.batch_stats})
    for name, items in (('one', {'net': tree}), ('two', {'net': tree, 'teacher': tree})):
        with ocp.CheckpointManager(tmp_path / name) as manager:
            config = ocp.args.JsonSave({'width': 12})
            manager.save(3, args=ocp.args.Composite(**items, config=config))
    for path in ('one', 'one/3', 'two/3/net'):
        new = trainer(tmp_path, init_from={'path': str(tmp_path / path)}).init_state()
        assert_same(new.params, state.params)
    for path in ('two', 'two/3'):
        with pytest.raises(UserError, match=r'two/3 contains several trees: .* net, teacher'):
            trainer(tmp_path, init_from={'path': str(tmp_path / path)}).init_state()


@pytest.mark.slow
def test_extra_and_missing_fields(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Extra fields are ignored; missing ones are an error, or keep the target's values."""
    state = net_state()
    plain = train_state.TrainState.create(
        apply_fn=state.apply_fn, params=jax.tree.map(jnp.zeros_like, state.params), tx=state.tx
    )
    ocp.PyTreeCheckpointer().save(tmp_path / 'more', state)
    found = restore.into(plain, tmp_path / 'more')
    assert type(found) is train_state.TrainState
    assert_same(found.params, state.params)

    ocp.PyTreeCheckpointer().save(tmp_path / 'less', plain)
    target = state.replace(batch_stats=jnp.arange(10))
    with pytest.raises(UserError, match=r'missing from .*:\n  batch_stats\n'):
        restore.into(target, tmp_path / 'less')
    found = restore.into(target, tmp_path / 'less', on_missing='init')
    np.testing.assert_array_equal(found.batch_stats, np.arange(10))
    assert_same(found.params, plain.params)
    assert "missing leaves that keep the target's values (1)" in caplog.text
    wider = Net(width=16)
    other = wider.init(jax.random.key(0), jnp.ones((2, 8)))['params']
    with pytest.raises(UserError, match=r'has other shapes or kinds of dtype than the target:\n'):
        restore.into({'params': other}, tmp_path / 'more')
    assert flatten(found)['step'] == 0
