# SPDX-License-Identifier: Apache-2.0
"""Plans of small models, compared with real runs."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests import command
from tests.command import ROOT
from trainer.experiment import load_and_build
from trainer.modes.plan import devices, plan
from trainer.modes.plan.plan import Plan
from trainer.observe import flops
from trainer.trainer import Trainer


def trainer(name: str, mesh: dict[str, int], **options: Any) -> Trainer:
    common = {'train_for': '20 steps', 'evals': {}, 'ema__decay': 0.9}
    experiment = load_and_build(str(ROOT / 'configs' / f'{name}.py'), **{**common, **options})
    devices = dataclasses.replace(experiment.devices, mesh=mesh)
    return Trainer(dataclasses.replace(experiment, devices=devices))


def planned_for(made: Trainer) -> Plan:
    setup = made.set_up()
    return plan.make(setup.programs, setup.mesh, made.experiment.clock.batch_size)


LM = {'model__layers': 2, 'model__width': 64, 'model__max_length': 32, 'data__source__seq_len': 32}


def bytes_on_first_device(tree: Any) -> int:
    """Returns the bytes of arrays on the first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(
    'mesh', [{'data': 8, 'fsdp': 1, 'model': 1}, dict(data=2, fsdp=2, model=2)]
)
def test_the_planned_state_equals_that_of_a_run(mesh: dict[str, int]) -> None:
    made = trainer('lm', mesh, **LM)
    planned, state = planned_for(made), made.init_state()
    assert planned.state['parameters'] == bytes_on_first_device(state.params)
    assert planned.state['optimizer'] == bytes_on_first_device(state.opt_state)
    assert planned.state['average'] == planned.state['parameters']
    assert sum(planned.state.values()) + 4 == bytes_on_first_device(
        state
    )  # The step's number is in no kind.
    assert planned.unsharded_state == sum(x.nbytes for x in jax.tree.leaves(state))
    assert planned.devices == 8
    assert planned.temporaries is not None and planned.temporaries > 0


def test_data_parallelism_only_sums_gradients() -> None:
    made = trainer('mnist_mlp', {'data': 8})
    planned = planned_for(made)
    params = planned.state['parameters']
    assert {(c.kind, c.axes) for c in planned.collectives} == {('all-reduce', ('data',))}
    sums = sum(c.nbytes for c in planned.collectives)
    # The gradients, and a few scalars of metrics.
    assert params <= sums <= params + 64
    assert planned.batch == 32 * (28 * 28 + 4) // 8
    assert planned.is_exact


def test_sharded_parameters_are_gathered() -> None:
    options = {'sharding': ({'target': 'trainer.sharding:FSDP', 'min_bytes': 1024},)}
    planned = planned_for(trainer('mnist_mlp', {'fsdp': 8}, **options))
    whole = planned_for(trainer('mnist_mlp', {'data': 8}))
    assert planned.state['parameters'] < 0.15 * whole.state['parameters']
    assert planned.unsharded_state == whole.unsharded_state
    assert {c.axes for c in planned.collectives} == {('fsdp',)}
    assert 'all-gather' in {c.kind for c in planned.collectives}
    assert planned.flops == whole.flops


def test_one_device_sends_nothing() -> None:
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ('data',), kind, devices=jax.devices()[:1])
    made = trainer('mnist_mlp', {'data': 8})
    planned = planned_for(Trainer(made.experiment, mesh=mesh))
    assert planned.collectives == ()
    assert 'no collectives' in plan.describe(planned)


def test_operations_are_counted_in_loops_and_branches() -> None:
    def product(x: jax.Array) -> jax.Array:
        return x @ x  # 2 x 8 x 8 x 8 operations

    one = 2 * 8**3
    x = jnp.ones((8, 8))

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (product(c), None), x, None, length=5)[0]

    def branch(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x.sum() > 0, lambda x: product(product(x)), product, x)

    def again(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jax.checkpoint(product)(x).sum())(x)

    for function, times in ((product, 1), (loop, 5), (branch, 2), (jax.jit(product), 1)):
        assert flops.count(jax.make_jaxpr(function)(x)) == times * one
    assert flops.count(jax.make_jaxpr(again)(x)) >= 2 * one
    image, kernel = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 2, 6))

    def convolve(image: jax.Array) -> jax.Array:
        return nn.Conv(6, (3, 3), feature_group_count=2).apply(
            {'params': {'kernel': kernel, 'bias': jnp.zeros(6)}}, image
        )

    assert flops.count(jax.make_jaxpr(convolve)(image)) == 2 * (2 * 9 * 9 * 6) * (3 * 3 * 2)


def plan_with(**changes: Any) -> Plan:
    base = Plan(
        mesh={'data': 8}, state={'parameters': 10**9, 'optimizer': 2 * 10**9},
        unsharded_state=3 * 10**9, batch_size=64, shards=8, batch=10**6, temporaries=10**9,
        flops=1e15, collectives=(), is_exact=True, compile_secs=1.0,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def test_reports_whether_the_state_fits() -> None:
    assert 'fits: 4.0 GB of 17.2 GB (v5e)' in plan.describe(plan_with(), 'v5e').splitlines()
    wide = plan_with(state={'parameters': 10**9, 'collections': 400})
    lines = plan.describe(wide).splitlines()[2:8]
    assert ' collections  400 B' in lines
    assert len({len(re.match(r' ?\w+( state)? +', line)[0]) for line in lines}) == 1
    large = plan_with(state={'parameters': 20 * 10**9}, unsharded_state=20 * 10**9)
    text = plan.describe(large, 'v5e')
    assert text.splitlines()[2] == 'DOES NOT FIT: 21.0 GB needed, 17.2 GB available (v5e)'
    assert '--config.sharding=fsdp --config.mesh=\'{"data": -1, "fsdp": 8}\'' in text
    sharded = plan_with(state={'parameters': 20 * 10**9}, unsharded_state=160 * 10**9)
    assert 'more devices on the axes that shard it' in plan.describe(sharded, 'v5e')
    busy = plan.describe(plan_with(temporaries=20 * 10**9), 'v5e')
    assert '--config.accumulate=4' in busy and '--config.model.remat=full' in busy
    # 1e15 operations on 8 devices of 197e12 in a second.
    assert 'at least 635 ms per step: compute 635 ms' in plan.describe(plan_with(), 'v5e')


def test_every_device_kind_has_plausible_numbers() -> None:
    for kind in devices.KINDS.values():
        assert kind.memory > 1e10 and kind.bandwidth > 1e11
        assert 1e13 < kind.flops < 1e16 and kind.links > 1e10


@pytest.mark.slow
def test_from_the_command_line() -> None:
    args = ('--config=configs/lm.py:bytes', '--mode=plan', '--config.model.layers=1')
    mesh = '--config.mesh={"data": 4, "fsdp": 4}'
    finished = command.run(*args, mesh, '--devices=16', '--config.data.batch_size=16')
    assert finished.code == 0, finished.err
    title = 'Train step on 16 devices, mesh data 4 x fsdp 4 x model 1 (compiled, not run)'
    assert title in finished.out
    for wrong, message in (
        ((*args, mesh, '--devices=8'), 'does not fit 8 devices'),
        ((*args, '--devices=16'), 'use 16'),
        (args, '--mode=plan needs --devices=N'),
        ((*args, '--devices=8', '--device_kind=v5x'), 'expected one of v4, v5e'),
    ):
        finished = command.run(*wrong)
        assert finished.code == 2 and message in finished.err, finished.err
        assert 'Traceback' not in finished.err


@pytest.mark.slow
def test_a_billion_parameters_on_512_devices() -> None:
    """The last row of the table in docs/benchmarks.md; it must fit a laptop."""
    table = [sys.executable, str(ROOT / 'tests' / 'benchmarks' / 'plan_table.py'), '--devices=512']
    finished = subprocess.run(table, capture_output=True, text=True, timeout=180)
    assert finished.returncode == 0, finished.stderr
    row = finished.stdout.splitlines()[-1]
    assert re.match(r'\| 512 \| data 64 x fsdp 8 \| 1\.7 GB \|', row), row
    memory = re.search(r'(\S+) GiB', row)
    assert memory is not None and float(memory[1]) < 8
