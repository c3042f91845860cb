# SPDX-License-Identifier: Apache-2.0
"""Memory of sharded states, measured from outside: no array is ever assembled."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import command
from tests.command import ROOT
from tests.parallel.test_mesh import MESHES, experiment, with_mesh
from trainer.checkpoint import digest
from trainer.observe.table import bytes_per_device
from trainer.parallel.mesh import make_mesh
from trainer.trainer import Trainer

WIDTH = 4096


class Wide(nn.Module):
    """Nearly all of its parameters are one kernel of 64 MiB."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(WIDTH, use_bias=False)(x.reshape(len(x), -1)[:, :16])
        return nn.Dense(10)(nn.relu(nn.Dense(WIDTH, use_bias=False, name='wide')(x)))


PROGRAM = """
import pathlib
import sys

import jax

from trainer.experiment import load_and_build
from trainer.observe.table import nbytes
from trainer.trainer import Trainer

workdir = sys.argv[1]


def experiment(**options):
    return load_and_build(
        'configs/mnist.py', model={'target': 'tests.parallel.test_memory:Wide'}, evals={},
        data__source__limit=96, train_for='1 steps', ema__decay=0.9, log__tensorboard=False,
        mesh={'data': 1, 'fsdp': 8}, sharding='fsdp', **options)


def status(name):
    text = pathlib.Path('/proc/self/status').read_text()
    return 1024 * int(text.split(name + ':')[1].split()[0])


def measure(what, make):
    before = status('VmRSS')
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # The peak counts from here.
    state = jax.block_until_ready(make())
    assert {s.data.shape for s in state.params['wide']['kernel'].addressable_shards} == {
        (4096, 512)}
    peak, now = ((status(name) - before) / whole for name in ('VmHWM', 'VmRSS'))
    print('of the state:', what, peak, now)


trainer = Trainer(experiment(), workdir)
whole = nbytes(trainer.set_up().programs.abstract)
trainer.set_up().programs.init.executable()
measure('init', trainer.init_state)
trainer.fit()
measure('restore', trainer.restore)
other = Trainer(experiment(init_from__path=workdir))
other.set_up().programs.init.executable(), other.set_up().programs.restart_optimizer.executable()
measure('init_from', other.init_state)
"""


@pytest.mark.slow
def test_memory_is_little_more_than_the_shards(tmp_path: pathlib.Path) -> None:
    """The state exists once over all devices, and once on the host, even at the peak."""
    assert os.path.exists('/proc/self/clear_refs'), (
        'Only Linux can reset the peak memory of a process, with /proc/self/clear_refs; elsewhere, '
        'deselect this test: -m "not slow"'
    )
    environment = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(ROOT),
        'XLA_FLAGS': command.xla_flags(8),
        'MALLOC_MMAP_THRESHOLD_': '262144',  # What is freed shall be seen to be gone.
    }
    ended = subprocess.run(
        [sys.executable, '-c', PROGRAM, str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    measured = re.findall(r'^of the state: (\w+) (\S+) (\S+)$', ended.stdout, flags=re.MULTILINE)
    found = {what: (float(peak), float(after)) for what, peak, after in measured}
    assert found.keys() >= {'init', 'restore', 'init_from'}, ended.stdout
    # Making normal numbers takes a few times their own share on each device, and no more.
    most = {'init': 2.0, 'restore': 1.5, 'init_from': 2.0}
    for what, (peak, after) in found.items():
        assert peak < most[what], found
        assert after < 1.2, found


def test_a_restarted_state_replaces_the_old_one() -> None:
    """`config.init_from` reinitializes slots and average in the memory of the old ones."""
    trainer = Trainer(with_mesh(experiment('lm'), MESHES['2 x 2 x 2']))
    analysis = trainer.set_up().programs.restart_optimizer.executable().memory_analysis()
    assert analysis is not None
    share = bytes_per_device(trainer.set_up().programs.abstract)
    assert analysis.alias_size_in_bytes == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize(
    'spec', [P('data'), P(None, 'model'), P('model', 'data'), P(), P(('data', 'model'))]
)
def test_the_digest_of_a_sharded_array_is_that_of_the_whole(spec: P) -> None:
    mesh = make_mesh({'data': 4, 'model': 2})
    rng = np.random.default_rng(0)
    state: dict[str, Any] = {
        'f32': rng.normal(size=(16, 24, 3)).astype('f4'),
        'c64': rng.normal(size=(8, 8)).astype('c8'),
        'i8': rng.integers(-9, 9, (16, 8)).astype('i1'),
        'bf16': np.asarray(rng.normal(size=(8, 40)), jax.numpy.bfloat16),
        'long': rng.normal(size=(8, 2**14)).astype('f4'),
    }
    sharded = jax.device_put(state, NamedSharding(mesh, spec))
    np.testing.assert_array_equal(digest.host_sums(sharded), digest.host_sums(state))
    # Nothing has put the parts together on the way.
    assert spec == P() or all(x._npy_value is None for x in jax.tree.leaves(sharded))
