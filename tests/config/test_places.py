# SPDX-License-Identifier: Apache-2.0
"""Paths that begin with '~'."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.command import ROOT
from trainer.config import loading, places
from trainer.config.errors import UserError
from trainer.data.mnist import MNIST
from trainer.data.npz import Npz
from trainer.run.workdir import Workdir
from trainer.weights import read

CONFIG = 'import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()\n'


@pytest.fixture
def home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Returns a home directory; the current directory is another one."""
    (tmp_path / 'home').mkdir()
    (tmp_path / 'here').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path / 'home'


def test_every_path_expands_the_home_directory(home: pathlib.Path) -> None:
    (home / 'mine.py').write_text(CONFIG)
    np.savez(home / 'x.npz', a=np.zeros((3, 1)))
    assert loading.load('~/mine.py').path == home / 'mine.py'
    Workdir('~/runs/a').create()
    assert (home / 'runs' / 'a').is_dir()
    assert len(Npz('~/x.npz')) == 3
    assert str(read.locate(read.epath.Path('~/x.npz'))) == str((home / 'x.npz').resolve())
    with pytest.raises(ValueError, match=str(home / 'none')):
        MNIST('train', directory='~/none')
    assert not list(pathlib.Path.cwd().iterdir())


def test_other_paths_are_unchanged() -> None:
    for path in ('runs/a', '/runs/~', './~/a', 'gs://bucket/~a'):
        assert places.expand(path, 'workdir') == path


def test_an_unknown_home_directory(home: pathlib.Path) -> None:
    for act in (Workdir, loading.load, lambda path: read.locate(read.epath.Path(path))):
        with pytest.raises(UserError, match=r"unknown home directory ~no_such_user .*'\./~no_such"):
            act('~no_such_user/x')  # type: ignore[operator]
    assert not list(pathlib.Path.cwd().iterdir())


@pytest.mark.slow
def test_the_compile_cache_needs_a_home_directory(home: pathlib.Path) -> None:
    """For a user without HOME and without an entry in /etc/passwd, as in some containers."""
    code = (
        'import jax, os, pwd\n'
        'def missing(number): raise KeyError(number)\n'
        'pwd.getpwuid = missing\n'
        'from trainer.modes import dispatch\n'
        'def cache(**env):\n'
        '    os.environ.update(env)\n'
        '    dispatch._enable_compile_cache()\n'
        '    print(jax.config.jax_compilation_cache_dir)\n'
        'cache()\n'
        'jax.jit(lambda x: x + 1)(1)\n'
        f'cache(HOME={str(home)!r})\n'
        "cache(JAX_COMPILATION_CACHE_DIR='~/cache')\n"
    )
    left_out = ('HOME', 'XDG_CACHE_HOME', 'JAX_COMPILATION_CACHE_DIR')
    env = {key: value for key, value in os.environ.items() if key not in left_out}
    finished = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=120,
        env={**env, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    default, given = f'{home}/.cache/jax-config-trainer', f'{home}/cache'
    assert finished.stdout.splitlines() == ['None', default, given]
    assert finished.stderr.count('There is no home directory, so') == 1
    assert not list(pathlib.Path.cwd().iterdir())
