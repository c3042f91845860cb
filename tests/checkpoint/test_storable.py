# SPDX-License-Identifier: Apache-2.0
"""States that Orbax cannot store as they are: converted, or refused before the first step."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import command
from tests.checkpoint.examples import abstract, state
from tests.marks import slow_after
from trainer.checkpoint import storable
from trainer.checkpoint.errors import SaveError
from trainer.checkpoint.manager import Checkpoints, Retention
from trainer.checkpoint.storable import check_storable
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.trainer import Trainer
from trainer.weights.read import open_tree


class WithEmpty(nn.Module):
    """Has parameters without elements, such as those of a disabled part."""

    features: Any = None
    rows: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        extra = self.param('extra', nn.initializers.zeros, (self.rows,))
        table = self.param('table', nn.initializers.zeros, (3, 0), jnp.bfloat16)
        return nn.Dense(10)(x.reshape(len(x), -1)) + extra.sum() + table.sum().astype(x.dtype)


class Clash(nn.Module):
    """Has two parameters whose Orbax names collide."""

    features: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bias = self.param('Dense_0.bias', nn.initializers.zeros, (10,))
        return nn.Dense(10)(x.reshape(len(x), -1)) + bias


def trainer_in(workdir: pathlib.Path | None, model: str, **overrides: Any) -> Trainer:
    options = {
        'train_for': '20 steps',
        'data__source__limit': 640,
        'evals': {},
        'optimizer': {'target': 'optax:adam', 'learning_rate': 1e-3},
        'model': {'target': f'{__name__}:{model}'},
    }
    config = str(command.ROOT / 'configs' / 'mnist_mlp.py')
    experiment = load_and_build(config, **{**options, **overrides})
    return Trainer(experiment, None if workdir is None else str(workdir))


def test_arrays_without_elements_are_restored(tmp_path: pathlib.Path) -> None:
    tree = {**state(), 'none': jnp.zeros((3, 0), 'bfloat16'), 'more': [jnp.zeros((0,), int)]}
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(1, tree, {'step': 1})
    checkpoints.close()
    assert checkpoints.meta(1)['digest'] == checkpoints.digest(tree)
    found = checkpoints.restore(1, abstract(tree))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tree
    )


@pytest.mark.parametrize('kind', ['threefry2x32', 'rbg'])
def test_empty_arrays_of_typed_keys(tmp_path: pathlib.Path, kind: str) -> None:
    keys = jax.random.split(jax.random.key(0, impl=kind), 3)
    tree = {**state(), 'keys': keys, 'none': keys[:0]}
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(1, tree, {})
    checkpoints.close()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    found = checkpoints.restore(1, shapes)
    assert (found['keys'] == keys).all()
    assert found['none'].dtype == keys.dtype and found['none'].shape == (0,)


def test_empty_arrays_get_their_sharding(tmp_path: pathlib.Path) -> None:
    mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    tree = {'kernel': jax.device_put(jnp.arange(16.0), sharding), 'none': jnp.zeros((8, 0))}
    tree['none'] = jax.device_put(tree['none'], sharding)
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(1, tree, {})
    checkpoints.close()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    found = checkpoints.restore(1, shapes)
    assert found['none'].sharding == sharding and found['none'].shape == (8, 0)
    np.testing.assert_array_equal(found['kernel'], tree['kernel'])


@pytest.mark.parametrize(
    ('wanted', 'line'),
    slow_after(
        1,
        [
            (jnp.zeros((0, 3)), 'none: float32[3, 0] in the checkpoint, float32[0, 3] in this run'),
            (jnp.zeros(2), 'none: float32[3, 0] in the checkpoint, float32[2] in this run'),
            (None, 'none: float32[3, 0] in the checkpoint, absent in this run'),
        ],
    ),
)
def test_another_state_is_not_called_damaged(
    tmp_path: pathlib.Path, wanted: Any, line: str
) -> None:
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(1, {**state(), 'none': jnp.zeros((3, 0))}, {})
    checkpoints.save(2, state(), {})
    checkpoints.close()
    with pytest.raises(UserError) as error:
        checkpoints.restore(1, abstract({**state(), 'none': wanted}))
    assert f'  {line}' in str(error.value).splitlines()
    with pytest.raises(UserError, match=r'none: absent in the checkpoint, float32\[3, 0\] in this'):
        checkpoints.restore(2, abstract({**state(), 'none': jnp.zeros((3, 0))}))


def test_a_state_without_empty_arrays_has_no_entry_for_them(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(1, state(), {'step': 1})
    checkpoints.close()
    assert set(checkpoints.meta(1)) == {'step', 'digest'}


@pytest.mark.slow
def test_a_run_with_empty_parameters_is_saved_resumed_and_loaded(tmp_path: pathlib.Path) -> None:
    once = trainer_in(tmp_path / 'once', 'WithEmpty').fit()
    trainer_in(tmp_path / 'twice', 'WithEmpty').fit(max_steps=7)
    twice = trainer_in(tmp_path / 'twice', 'WithEmpty').fit()
    assert once.step == twice.step == 20
    digests = [command.result(tmp_path / name)['digest'] for name in ('once', 'twice')]
    assert digests[0] == digests[1]

    leaves = open_tree(tmp_path / 'once')
    assert leaves['params', 'table'].shape == (3, 0)
    init_from = {'path': str(tmp_path / 'once'), 'optimizer': True}
    loaded = trainer_in(None, 'WithEmpty', init_from=init_from).init_state()
    np.testing.assert_array_equal(
        loaded.params['Dense_0']['kernel'], once.state.params['Dense_0']['kernel']
    )


def test_every_dtype_but_one_is_storable() -> None:
    names = ['float32', 'bfloat16', 'float16', 'int32', 'uint8', 'bool', 'complex64', 'int4']
    tree = {name: jax.ShapeDtypeStruct((2, 3), jnp.dtype(name)) for name in names}
    tree['float8'] = jax.ShapeDtypeStruct((2,), jnp.float8_e4m3fn)
    tree['none'] = jax.ShapeDtypeStruct((0,), jnp.uint4)
    tree['key'] = jax.eval_shape(lambda: jax.random.key(0))
    check_storable(tree)
    before = SaveError.occurred
    tree['params'] = {'small': jax.ShapeDtypeStruct((4,), jnp.uint4)}
    with pytest.raises(UserError, match=r'params/small \(uint4\): ValueError: .*uint4') as error:
        check_storable(tree)
    assert len(str(error.value).splitlines()) == 3
    assert SaveError.occurred == before


def test_unusual_names_are_storable() -> None:
    odd = {'a/b': 0, '': 0, 'x y': 0, 'ü\n': {'"': 0, '.': 0}, 'z' * 1000: 0, '..': 0}
    check_storable(jax.tree.map(lambda _: jax.ShapeDtypeStruct((), 'float32'), odd))


def test_an_unwritable_temporary_directory_refuses_no_state(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(storable, '_accepted', set())
    monkeypatch.setattr(Checkpoints, '_write', lambda *_: (tmp_path / 'file' / 'x').mkdir())
    check_storable(state())
    assert storable._accepted == set()


@pytest.mark.slow
def test_colliding_names_are_refused_before_the_first_step(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"both map to 'params\.Dense_0\.bias'"):
        trainer_in(tmp_path, 'Clash').fit()
    assert not (tmp_path / 'metrics.jsonl').exists()
    # Without a work directory nothing is saved, so nothing is refused.
    assert trainer_in(None, 'Clash').fit(max_steps=1).step == 1


def test_without_a_temporary_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, 'tempdir', '/nowhere')
    monkeypatch.setattr(storable, '_accepted', set())
    check_storable(state())
