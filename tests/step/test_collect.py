# SPDX-License-Identifier: Apache-2.0
"""A source that makes its batches with the model, on the devices."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from tests import command
from tests.small import one_device
from trainer.config.errors import UserError
from trainer.experiment import build
from trainer.trainer import Trainer

HERE = __name__


class Line(nn.Module):
    """w x; one parameter."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        w = self.param('w', nn.initializers.zeros, (), jnp.float32)
        return w * x + (100.0 if train else 0.0)


class Walk:
    """Three batches for each call: what the model makes of 1 now, and how often it was called."""

    num_batches = 3

    def __init__(self, fields: tuple[str, ...] = ('x', 'call'), rows: int = 8):
        self._fields, self._rows = fields, rows

    @property
    def spec(self) -> dict[str, Any]:
        return dict.fromkeys(('x', 'call'), jax.ShapeDtypeStruct((), jnp.float32))

    def initial_carry(self, key: jax.Array) -> Any:
        return {'calls': jnp.int32(0), 'key': key}

    def collect(self, state: Any, carry: Any, key: jax.Array) -> Any:
        now = state.model(jnp.ones(1))[0]
        fields = {
            'x': jnp.broadcast_to(now, (3, self._rows)),
            'call': jnp.full((3, self._rows), carry['calls'], jnp.float32),
        }
        carry = {'calls': carry['calls'] + 1, 'key': jax.random.fold_in(carry['key'], 1)}
        return {name: fields[name] for name in self._fields}, carry


def move(model: Any, batch: Any) -> Any:
    """Pulls w up by 1 in each step: the gradient is -1."""
    return -(model(jnp.ones(8)) - 100.0), {'seen': batch['x'], 'call': batch['call']}


def config(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = dict(
        train_for='10 steps',
        model=dict(target=f'{HERE}:Line'),
        task=dict(ref=f'{HERE}:move'),
        data=dict(source=dict(target=f'{HERE}:Walk'), batch_size=8),
        optimizer=dict(target='optax:sgd', learning_rate=1.0),
        log=dict(every='1 steps'),
        checkpoint=dict(every='4 steps'),
    )
    return {**made, **changes}


def trainer(workdir: pathlib.Path | None = None, **changes: Any) -> Trainer:
    directory = None if workdir is None else str(workdir)
    made = ml_collections.ConfigDict(config(**changes))
    return Trainer(build(made), directory, mesh=one_device(), verbose=False)


def test_each_call_sees_the_model_of_its_step() -> None:
    history = trainer().fit().history
    # w is the number of steps; the source is called in steps 0, 3, 6 and 9.
    np.testing.assert_allclose(history['train/seen'].values, [0, 0, 0, 3, 3, 3, 6, 6, 6, 9])
    np.testing.assert_allclose(history['train/call'].values, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3])


@pytest.mark.slow
def test_a_resumed_run_equals_a_whole_one(tmp_path: pathlib.Path) -> None:
    """Also in the middle of what was collected: after 4 steps there are two batches left."""
    trainer(tmp_path / 'whole').fit()
    trainer(tmp_path / 'parts').fit(max_steps=4)
    trainer(tmp_path / 'parts').fit(max_steps=1)
    trainer(tmp_path / 'parts').fit()
    command.assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


@pytest.mark.slow
def test_several_steps_per_call_are_the_same() -> None:
    one, three = (trainer(steps_per_call=n, log={'every': '9 steps'}).fit() for n in (1, 4))
    assert float(one.state.params['w']) == float(three.state.params['w']) == 10
    assert one.metrics['train/seen'] == three.metrics['train/seen']
    assert int(one.state.carry.source['calls']) == int(three.state.carry.source['calls']) == 4


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'data': dict(source=dict(target=f'{HERE}:Walk', fields=('x',)), batch_size=8)},
            r"Walk.collect returned the fields \['x'\]; its spec has \['call', 'x'\]",
        ),
        (
            {'data': dict(source=dict(target=f'{HERE}:Walk', rows=4), batch_size=8)},
            r"returned '(x|call)' as float32\[3, 4\]; expected float32\[3, 8\]",
        ),
        ({'ensemble': dict(size=2)}, 'Walk collects for one model, not for an ensemble'),
        ({'train_for': '2 epochs'}, 'epoch'),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(**changes).fit()


class Unfinished:
    """A source with a part of what it needs."""

    def collect(self, state: Any, carry: Any, key: jax.Array) -> Any: ...


def test_what_a_source_lacks_is_named() -> None:
    with pytest.raises(UserError, match='so it also needs spec, num_batches, initial_carry'):
        trainer(data=dict(source=dict(target=f'{HERE}:Unfinished'), batch_size=8))
