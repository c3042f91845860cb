# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of NNX and of boxed Linen variables, and other layouts of Orbax."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

from tests.weights.examples import Net, assert_same, initial_state, trainer
from trainer.config.errors import UserError
from trainer.weights import restore


class Backbone(nnx.Module):
    """A layer with batch norm and an RNG stream."""

    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(8, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(nnx.relu(self.norm(self.dense(x))))


class NNXNet(nnx.Module):
    """A backbone and a head."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.backbone = Backbone(rngs)
        self.head = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.backbone(x))


X = np.random.default_rng(0).normal(size=(16, 8)).astype('f4')


def save(path: pathlib.Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


@pytest.mark.slow
def test_states_of_nnx(tmp_path: pathlib.Path) -> None:
    """The outputs are those of the module, batch statistics included."""
    module = NNXNet(rngs=nnx.Rngs(5))
    for _ in range(3):  # In training: the statistics move.
        module(X)
    state, variables = nnx.state(module), nnx.state(module, (nnx.Param, nnx.BatchStat))
    split = {
        'params': nnx.state(module, nnx.Param),
        'batch_stats': nnx.state(module, nnx.BatchStat),
    }
    save(tmp_path / 'state', state)
    save(tmp_path / 'pure', nnx.to_pure_dict(state))
    save(tmp_path / 'split', split)
    save(tmp_path / 'beside', {'model': state, 'epoch': 3})
    save(tmp_path / 'params', {'params': state})
    pure = serialization.msgpack_serialize(jax.device_get(nnx.to_pure_dict(variables)))
    (tmp_path / 'pure.msgpack').write_bytes(pure)
    module.eval()
    run = trainer(tmp_path, model={'target': f'{__name__}:NNXNet'})
    for name in ('state', 'pure', 'split', 'beside', 'params', 'pure.msgpack'):
        at = 'model' if name == 'beside' else ''
        initial = initial_state(run, path=str(tmp_path / name), at=at)
        np.testing.assert_allclose(run.model(initial)(X), module(X), atol=1e-6, err_msg=name)
    save(tmp_path / 'weights', nnx.state(module, nnx.Param))
    with pytest.raises(UserError, match=r'Missing:\n  batch_stats/backbone/norm/mean'):
        initial_state(run, path=str(tmp_path / 'weights'))


@pytest.mark.slow
def test_boxes_of_linen(tmp_path: pathlib.Path) -> None:
    """Around all or some parameters, in either format, with optimizer slots."""
    variables = Net().init(jax.random.key(7), X)
    variables['batch_stats'] = jax.tree.map(lambda x: x + 0.3, variables['batch_stats'])

    def box_params(only: str) -> Any:
        def box(path: Any, x: jax.Array) -> Any:
            chosen = only in jax.tree_util.keystr(path)
            return nn.Partitioned(x, names=(None,) * x.ndim) if chosen else x

        params = jax.tree_util.tree_map_with_path(box, variables['params'])
        return {**variables, 'params': params}

    run = trainer(tmp_path)
    for only in ('', 'kernel'):
        save(tmp_path / f'boxed{only}', box_params(only))
        (tmp_path / f'{only}.msgpack').write_bytes(serialization.to_bytes(box_params(only)))
        for name in (f'boxed{only}', f'{only}.msgpack'):
            initial = initial_state(run, path=str(tmp_path / name))
            assert_same(initial.params, variables['params'])
            assert_same(initial.collections['batch_stats'], variables['batch_stats'])
    params = box_params('')['params']
    tx = optax.adam(0.1)
    grads = jax.tree.map(lambda x: x + 1, params)
    slots = tx.update(grads, tx.init(params), params)[1]
    save(tmp_path / 'trained', {**box_params(''), 'opt_state': slots})
    initial = initial_state(run, path=str(tmp_path / 'trained'), optimizer=True)
    assert_same(initial.opt_state[0].mu, nn.meta.unbox(slots[0].mu))


def test_a_parameter_that_is_called_value(tmp_path: pathlib.Path) -> None:
    """It is not taken for a box."""
    save(tmp_path / 'scales', {'params': {'scale': {'value': np.arange(3.0, dtype='f4')}}})
    run = trainer(tmp_path, model={'target': f'{__name__}:Scaled'})
    initial = initial_state(run, path=str(tmp_path / 'scales'))
    np.testing.assert_array_equal(initial.params['scale']['value'], np.arange(3.0))


class Scale(nn.Module):
    """Multiplies by a parameter."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param('value', nn.initializers.ones, (3,))


class Scaled(nn.Module):
    """Its only parameter is called 'value'."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Scale(name='scale')(x[:, :3])


def test_step_numbers_padded_with_zeros(tmp_path: pathlib.Path) -> None:
    """A manager's `step_format_fixed_length`."""
    options = ocp.CheckpointManagerOptions(step_format_fixed_length=8)
    with ocp.CheckpointManager(tmp_path / 'manager', options=options) as manager:
        for step in (9, 10):
            manager.save(step, args=ocp.args.StandardSave({'params': {'x': np.full(2, step)}}))
    assert (tmp_path / 'manager' / '00000009').is_dir()
    for step, expected in (('latest', 10), (9, 9), ('10', 10)):
        assert restore.raw(tmp_path / 'manager', step)['params']['x'].tolist() == [expected] * 2
    with pytest.raises(UserError, match="has no checkpoint '7'; available: 9, 10"):
        restore.raw(tmp_path / 'manager', 7)


@pytest.mark.slow
def test_items_that_are_one_state(tmp_path: pathlib.Path) -> None:
    """With an item 'params', all items of the step are one training state."""
    variables = Net().init(jax.random.key(7), X)
    opt_state = optax.adam(0.1).init(variables['params'])
    items = {**variables, 'opt': opt_state, 'info': {'name': 'net'}}
    saved = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    with ocp.CheckpointManager(tmp_path / 'manager') as manager:
        manager.save(3, args=ocp.args.Composite(**saved, meta=ocp.args.JsonSave({'a': 1})))
    found = restore.model_variables(tmp_path / 'manager')
    assert_same(found['params'], variables['params'])
    assert_same(found['batch_stats'], variables['batch_stats'])
    raw = restore.raw(tmp_path / 'manager' / '3')
    assert set(raw) == set(items) and raw['info'] == {'name': 'net'}
    target = {'opt': opt_state, 'info': {'name': ''}}
    assert restore.into(target, tmp_path / 'manager')['info']['name'] == 'net'
    alone = restore.model_variables(tmp_path / 'manager' / '3' / 'params')
    assert_same(alone, {'params': variables['params']})


def test_typed_keys(tmp_path: pathlib.Path) -> None:
    """Of any kind and shape, into keys or their shapes; a raw key takes their data."""
    keys = {
        'key': jax.random.key(3),
        'rbg': jax.random.key(1, impl='rbg'),
        'many': jax.random.split(jax.random.key(3), 4),
    }
    save(tmp_path / 'keys', {**keys, 'w': np.ones(3)})
    fresh = {name: jax.random.wrap_key_data(jax.random.key_data(k) * 0, impl=jax.random.key_impl(k))
             for name, k in keys.items()}  # fmt: skip
    for target in (fresh, jax.eval_shape(lambda: fresh)):
        found = restore.into({**target, 'w': np.zeros(3)}, tmp_path / 'keys')
        for name, key in keys.items():
            assert found[name].dtype == key.dtype and found[name].shape == key.shape
            np.testing.assert_array_equal(
                jax.random.key_data(found[name]), jax.random.key_data(key)
            )
    raw = restore.into({'key': jax.random.PRNGKey(0)}, tmp_path / 'keys')
    assert raw['key'].tolist() == [0, 3]
    with pytest.raises(UserError, match=r'key: got uint32\[2\], the target has uint32\[4\]'):
        restore.into({'key': fresh['rbg']}, tmp_path / 'keys')
    kept = restore.into(
        {'w': np.zeros(3), 'new': keys['rbg']}, tmp_path / 'keys', on_missing='init'
    )
    assert kept['new'] is keys['rbg']


def test_restore_into_shapes(tmp_path: pathlib.Path) -> None:
    """Arrays get the shardings of the shapes; missing ones have no value to keep."""
    save(tmp_path / 'tree', {'w': np.arange(8.0, dtype='f4'), 'n': np.arange(4)})
    mesh = jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:4])  # fmt: skip
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))

    def shape(size: int, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size,), dtype, sharding=sharding)

    target = {'w': shape(8, 'float32'), 'n': shape(4, 'int32')}
    found = restore.into(target, tmp_path / 'tree')
    assert_same(found, {'w': np.arange(8.0, dtype='f4'), 'n': np.arange(4, dtype='i4')})
    assert all(x.sharding == sharding for x in found.values())
    missing = {**target, 'new': shape(4, 'float32')}
    with pytest.raises(UserError, match=r'the target has no value:\n  new\n'):
        restore.into(missing, tmp_path / 'tree', on_missing='init')
    ignore: Any = 'ignore'
    with pytest.raises(UserError, match="on_missing='ignore': expected 'error' or 'init'"):
        restore.into(missing, tmp_path / 'tree', on_missing=ignore)
    for dtype in ('int32', 'bool'):
        with pytest.raises(UserError, match=rf'w: got float32\[8\], the target has {dtype}\[8\]'):
            restore.into({'w': shape(8, dtype)}, tmp_path / 'tree')
    assert restore.into({'n': np.zeros(4)}, tmp_path / 'tree')['n'].tolist() == [0, 1, 2, 3]


def test_almost_right_paths(tmp_path: pathlib.Path) -> None:
    """A directory with a weight file, and a numpy archive, are named in the message."""
    (tmp_path / 'model.safetensors').write_bytes(b'')
    (tmp_path / 'vocab.txt').write_text('')
    with pytest.raises(UserError, match=r'to load model\.safetensors, add the file to the path$'):
        restore.raw(tmp_path)
    np.savez(tmp_path / 'weights.npz', x=np.ones(3))
    with pytest.raises(UserError, match=r'weights\.npz is a numpy archive'):
        restore.raw(tmp_path / 'weights.npz')
