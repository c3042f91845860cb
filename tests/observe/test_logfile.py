# SPDX-License-Identifier: Apache-2.0
"""The screen shows only our own lines and is logged; library messages go to a separate file."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests import command

SCRIPT = """
import pathlib, sys
from trainer.observe import logfile

logfile.quiet_environment()
import logging, warnings
import jax, jax.numpy as jnp
import orbax.checkpoint as ocp

directory = pathlib.Path(sys.argv[1])
logfile.route(None)
logging.getLogger('orbax').warning('before there is a file')
logfile.route(directory)

with ocp.CheckpointManager(directory / 'checkpoints') as manager:
    manager.save(1, args=ocp.args.StandardSave({'x': jax.jit(jnp.sin)(jnp.ones(4))}))
    manager.wait_until_finished()
logging.getLogger('orbax').error('an error of a library')
warnings.warn('a warning of a library')
class Dying:
    def __del__(self):
        raise OSError('in a destructor')
Dying()
logging.getLogger('trainer').info('too small to be shown')
logging.getLogger('trainer').warning('one of %s', 'ours')
import io
from trainer.observe.progress import Progress
progress = Progress(10, io.StringIO())
progress.message('two lines:\\n  the second')
progress.update(5, {'train/loss': 0.5})
try:
    raise ValueError('a mistake')
except ValueError as error:
    logfile.record_error(error)
"""


def run(directory: pathlib.Path) -> subprocess.CompletedProcess[str]:
    silent = {k: v for k, v in os.environ.items() if k != 'TF_CPP_MIN_LOG_LEVEL'}
    return subprocess.run(
        [sys.executable, '-X', 'dev', '-c', SCRIPT, str(directory)],
        cwd=command.ROOT,
        # With a cache of compiled programs, where XLA's C++ has something to say at each load.
        env={**silent, 'JAX_COMPILATION_CACHE_DIR': str(directory.parent / 'cache')},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_screen_shows_our_own_warnings_and_nothing_else(tmp_path: pathlib.Path) -> None:
    for start in ('first', 'second'):
        directory = tmp_path / start
        directory.mkdir()
        done = run(directory)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ''
        assert done.stderr == 'Warning: one of ours\n'
    debug = (directory / 'debug.log').read_text()
    for said in (
        'Saving checkpoint at step 1',
        'an error of a library',
        'a warning of a library',
        'OSError: in a destructor',
        'too small to be shown',
        'WARNING trainer: one of ours',
        'ValueError: a mistake',
    ):
        assert said in debug
    assert 'before there is a file' not in debug
    log = (directory / 'log.txt').read_text().splitlines()
    assert all(re.fullmatch(r'20\d\d-\d\d-\d\d \d\d:\d\d:\d\d .*', line) for line in log[:6])
    assert [line[20:] for line in log[:6]] == [
        'too small to be shown',
        'Warning: one of ours',
        'two lines:',
        '  the second',
        'step 5/10 (50%)  loss 0.5000',
        'The run has failed:',
    ]
    assert log[-1][20:] == 'ValueError: a mistake'


@pytest.mark.slow
def test_a_file_that_cannot_be_written_costs_one_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'log.txt').symlink_to('/dev/full')
    (tmp_path / 'debug.log').mkdir()
    script = (
        'import logging, sys; from trainer.observe import logfile; logfile.route(sys.argv[1]); '
        '[logfile.record(str(i)) for i in range(10)]; logging.getLogger("trainer").warning("w")'
    )
    done = subprocess.run(
        [sys.executable, '-c', script, str(tmp_path)],
        cwd=command.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lost, full, warning = done.stderr.splitlines()
    assert re.fullmatch(r'Warning: .*debug.log cannot be written \(.*Is a directory.*\).*', lost)
    assert re.fullmatch(r'Warning: .*log.txt cannot be written \(.*No space.*\).*', full)
    assert warning == 'Warning: w'


@pytest.mark.slow
def test_on_a_terminal_a_warning_first_clears_the_live_line() -> None:
    script = (
        'import logging; from trainer.observe import logfile; logfile.route(None); '
        'logging.getLogger("trainer").warning("mind this")'
    )
    leader, follower = os.openpty()
    subprocess.run([sys.executable, '-c', script], cwd=command.ROOT, stderr=follower, check=True)
    os.close(follower)
    assert os.read(leader, 1000).decode() == '\r\x1b[KWarning: mind this\r\n'
    os.close(leader)
