# SPDX-License-Identifier: Apache-2.0
"""The libraries' chatter goes to the file; the screen shows our own warnings only."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

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


def test_the_screen_shows_our_own_warnings_and_nothing_else(tmp_path: pathlib.Path) -> None:
    for start in ('first', 'second'):
        directory = tmp_path / start
        directory.mkdir()
        done = run(directory)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ''
        assert done.stderr == 'Warning: one of ours\n'
    text = (directory / 'log.txt').read_text()
    for said in (
        'Saving checkpoint at step 1',
        'an error of a library',
        'a warning of a library',
        'OSError: in a destructor',
        'too small to be shown',
        'WARNING trainer: one of ours',
    ):
        assert said in text
    assert 'before there is a file' not in text


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
