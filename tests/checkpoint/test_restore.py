# SPDX-License-Identifier: Apache-2.0
"""Restores: a state of another form is an error that lists the leaves; damage is detected."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.examples import abstract, state
from trainer.checkpoint.manager import CheckpointError, Checkpoints, Retention
from trainer.config.errors import UserError
from trainer.step.state import TrainState

Pair = collections.namedtuple('Pair', ['mu', 'nu'])


@pytest.fixture
def saved_checkpoints(tmp_path: pathlib.Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(1, state(1), {})
    checkpoints.close()
    return checkpoints


@pytest.mark.parametrize(
    ('change', 'line'),
    [
        ({'count': jnp.float32(0)}, 'count: int32[] in the checkpoint, float32[] in this run'),
        ({'count': jnp.zeros(3, int)}, 'count: int32[] in the checkpoint, int32[3] in this run'),
        ({'ema': jnp.zeros(2)}, 'ema: absent in the checkpoint, float32[2] in this run'),
        ({'count': None}, 'count: int32[] in the checkpoint, absent in this run'),
        (
            {'params': {'kernel': jnp.zeros((60, 71), 'bfloat16')}},
            'params/kernel: float32[60, 70] in the checkpoint, bfloat16[60, 71] in this run',
        ),
    ],
)
def test_another_state_is_an_error_that_names_the_leaf(
    saved_checkpoints: Checkpoints, change: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as error:
        saved_checkpoints.restore(1, abstract({**state(), **change}))
    first, *lines, last = str(error.value).splitlines()
    assert first == f'{saved_checkpoints.directory / "1"} does not fit the state of this config:'
    assert lines == [f'  {line}']
    assert 'set another --workdir' in last


def test_a_field_that_may_differ_is_returned_as_it_was_saved(tmp_path: pathlib.Path) -> None:
    """And checked like all others; a difference elsewhere is still an error."""
    checkpoints = Checkpoints(tmp_path, Retention())
    old = {'loss': Pair(mu=jnp.arange(3.0), nu=jnp.int32(7)), 'none': jnp.zeros((0, 2))}
    params = {'kernel': jnp.ones((2, 3))}
    checkpoints.save(1, TrainState(jnp.int32(1), params, (), {}, old), {})
    checkpoints.close()
    new = abstract(TrainState(jnp.int32(0), params, (), {}, {'loss': jnp.zeros(5)}))
    with pytest.raises(UserError, match='metrics/loss: absent in the checkpoint'):
        checkpoints.restore(1, new)
    found = checkpoints.restore(1, new, free='metrics')
    assert int(found.step) == 1
    assert found.metrics['loss']['mu'].tolist() == [0, 1, 2]
    assert found.metrics['loss']['nu'] == 7 and found.metrics['none'].shape == (0, 2)
    same = abstract(TrainState(jnp.int32(0), params, (), {}, old))
    assert isinstance(checkpoints.restore(1, same, free='metrics').metrics['loss'], Pair)
    other = abstract(TrainState(jnp.int32(0), {'kernel': jnp.ones(2)}, (), {}, {}))
    with pytest.raises(UserError) as error:
        checkpoints.restore(1, other, free='metrics')
    assert [line.split(':')[0] for line in str(error.value).splitlines()[1:-1]] == [
        '  params/kernel'
    ]


def test_many_differences_are_counted(saved_checkpoints: Checkpoints) -> None:
    many = {f'x{i}': jnp.zeros(i + 1) for i in range(40)}
    with pytest.raises(UserError, match=r'\n  and 30 more\n') as error:
        saved_checkpoints.restore(1, abstract({**state(), **many}))
    assert len(str(error.value).splitlines()) == 13


def test_containers_without_leaves_may_differ(tmp_path: pathlib.Path) -> None:
    """Adding a transformation without state to a chain of optax does not change the state."""
    pair = Pair(mu=jnp.arange(3.0), nu=[jnp.int32(1), jnp.zeros((2, 2))])
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(1, {'opt': (pair, None), 'gone': {}}, {})
    checkpoints.close()
    found = checkpoints.restore(1, abstract({'opt': (pair, None, ()), 'ema': None}))
    assert isinstance(found['opt'][0], Pair) and found['ema'] is None
    jax.tree.map(np.testing.assert_array_equal, found['opt'], (pair, None, ()))


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def data_file(step: pathlib.Path) -> pathlib.Path:
    return max(step.glob('state/ocdbt.process_0/d/*'), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize('damage', [truncate, flip, pathlib.Path.unlink])
@pytest.mark.parametrize(
    'find',
    [
        data_file,
        lambda step: step / 'meta' / 'metadata',
        lambda step: step / 'state' / '_METADATA',
        lambda step: next(step.glob('state/d/*')),
        lambda step: step / 'state' / 'manifest.ocdbt',
    ],
    ids=['data', 'json', 'tree', 'index', 'manifest'],
)
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_damage_is_detected_and_named(
    saved_checkpoints: Checkpoints,
    damage: Callable[[pathlib.Path], None],
    find: Callable[[pathlib.Path], pathlib.Path],
) -> None:
    damage(find(pathlib.Path(saved_checkpoints.directory / '1')))
    with pytest.raises(CheckpointError) as error:
        saved_checkpoints.restore(1, abstract(state()))
    assert f'{saved_checkpoints.directory / "1"} is damaged: ' in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert error.value.exit_code == 65


def test_a_checkpoint_deleted_during_the_read_is_not_called_damaged(
    saved_checkpoints: Checkpoints,
) -> None:
    """A run may delete old checkpoints while another process reads them."""
    (saved_checkpoints.directory / '1').rmtree()
    with pytest.raises(CheckpointError, match='was deleted while it was being read'):
        saved_checkpoints.meta(1)
