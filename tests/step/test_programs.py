# SPDX-License-Identifier: Apache-2.0
"""The compiled train step: donated buffers, norms as on accelerators, and collectives in order."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.command import ROOT
from tests.marks import slow_after
from trainer.experiment import load_and_build
from trainer.parallel.mesh import batch_sharding
from trainer.step import programs as program_lib
from trainer.step import step_metrics as norms
from trainer.trainer import Trainer

MNIST = str(ROOT / 'configs' / 'mnist_mlp.py')
FSDP = {'mesh': {'data': 4, 'fsdp': 2}, 'sharding': [{'target': 'trainer.sharding:FSDP'}]}
NNX = {'model__target': 'trainer.models.mlp_nnx:MLP'}


def trainer(**overrides: Any) -> Trainer:
    options = {'data__source__limit': 640, 'model__features': (8, 10), 'evals': {}}
    return Trainer(load_and_build(MNIST, **{**options, **overrides}))


@pytest.mark.parametrize(
    'options',
    slow_after(2, [FSDP, {'steps_per_call': 2}, {}, NNX, {'ensemble__size': 2}]),
    ids=['fsdp', 'fused', 'data', 'nnx', 'ensemble'],
)
def test_state_leaves_keep_their_buffers_on_accelerators(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves that move to other buffers are copied, and prevent the replay of CUDA graphs."""
    monkeypatch.setattr(program_lib, '_keeps_unused_arguments', lambda mesh: True)
    programs = trainer(**options).set_up().programs
    program = programs.fused if 'steps_per_call' in options else programs.step
    header = program.executable().as_text().splitlines()[0]
    pairs = re.findall(r'\{(\d+)\}: \((\d+), \{\}', header)
    leaves = len(jax.tree.leaves(programs.abstract))
    assert [(int(out), int(arg)) for out, arg in pairs] == [(i, i) for i in range(leaves)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('options', 'together'),
    [({}, 4), ({'ensemble__size': 2}, 4), (FSDP, 3)],
    ids=['data', 'ensemble', 'fsdp'],
)
def test_norms_are_equal_on_accelerators(
    options: dict[str, Any], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, all small parameters are concatenated, except for those that are sharded."""
    joined = []

    def concatenate(arrays: Any) -> Any:
        joined.append(len(arrays))
        return original(arrays)

    original = norms._concatenate
    monkeypatch.setattr(norms, '_concatenate', concatenate)

    def step() -> Any:
        run = trainer(model__features=(64, 10), log__every='1 step', **options)
        batch = {name: x[0] for name, x in run.experiment.data.block(0, 1).arrays.items()}
        placed = jax.device_put(batch, batch_sharding(run.set_up().mesh))
        return jax.device_get(run.set_up().programs.step(run.init_state(), placed))

    state = step()
    assert not joined
    with monkeypatch.context() as patch:
        patch.setattr(norms.jax, 'default_backend', lambda: 'gpu')
        other = step()
    assert set(joined) == {together}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, other)


def test_collectives_of_virtual_devices_run_one_by_one() -> None:
    """Side by side, they wait for each other when there are fewer cores than devices."""

    def sums(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Over different axes, so that the compiler cannot combine them.
        return jnp.cumsum(jnp.tanh(x).sum(0)), jnp.cumsum(jnp.tanh(y).sum(1))

    mesh = jax.make_mesh((2, 4), ('a', 'b'))
    arguments = [
        jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        for spec in (jax.P('a'), jax.P(None, 'b'))
    ]
    text = program_lib.Program('sums', sums, tuple(arguments)).executable().as_text()
    scheduled = re.findall(r'= \S+ ([a-z-]+)\(', text[text.index('ENTRY') :])
    first, second = (i for i, name in enumerate(scheduled) if name == 'all-reduce')
    # What follows the first sum is computed before the second one begins.
    assert 'fusion' in scheduled[first:second]
