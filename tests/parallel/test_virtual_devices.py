# SPDX-License-Identifier: Apache-2.0
"""Threads for virtual CPU devices."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import types

import pytest

from tests import command
from trainer.parallel import virtual_devices

FLAG = '--xla_force_host_platform_device_count='
# Without more threads than devices (or more cores), this program never ends: all threads wait.
QR_ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp
from trainer.parallel import virtual_devices
virtual_devices.add_threads()
mesh = jax.make_mesh((8,), ('data',))
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
keys = jax.random.split(jax.random.key(0), 2)
init = lambda key: jax.nn.initializers.orthogonal()(key, (256, 256))
a = jax.jit(jax.vmap(init), out_shardings=everywhere)(keys)
assert jnp.allclose(a[1].T @ a[1], jnp.eye(256), atol=1e-4)
print(len(jax.devices()), 'devices')
"""


@pytest.mark.parametrize(
    ('flags', 'option', 'before', 'expected'),
    [
        ('', -1, None, None),
        (f'{FLAG}1', -1, None, None),
        (f'--xla_dump_to=x {FLAG}4 {FLAG}8', -1, None, 8 + (os.cpu_count() or 1)),
        ('', 3, None, 3 + (os.cpu_count() or 1)),
        (f'{FLAG}8', -1, '2', '2'),
    ],
)
def test_there_are_more_threads_than_virtual_devices(
    flags: str,
    option: int,
    before: str | None,
    expected: int | str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('XLA_FLAGS', flags)
    monkeypatch.delenv('NPROC', raising=False)
    if before is not None:
        monkeypatch.setenv('NPROC', before)
    config = types.SimpleNamespace(jax_num_cpu_devices=option)
    monkeypatch.setattr(virtual_devices, 'jax', types.SimpleNamespace(config=config))
    virtual_devices.add_threads()
    assert os.environ.get('NPROC') == (None if expected is None else str(expected))


@pytest.mark.slow
def test_batched_decompositions_end_on_virtual_devices() -> None:
    variables = command.environment(devices=8)
    variables.pop('NPROC', None)
    done = subprocess.run(
        [sys.executable, '-c', QR_ON_EIGHT_DEVICES],
        env=variables,
        cwd=command.ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout == '8 devices\n', done.stderr


@pytest.mark.slow
def test_ensemble_with_orthogonal_kernels_trains_on_virtual_devices(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv('NPROC', raising=False)
    done = command.run(
        '--config=configs/addition.py',
        f'--workdir={tmp_path}',
        '--config.train_for=2steps',
        '--config.ensemble.size=2',
        '--config.evals={}',
        devices=8,
    )
    assert done.code == 0, done.err
