# SPDX-License-Identifier: Apache-2.0
"""Environments with this project in them, as `pip install .` and `pip install -e .` make them."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

from tests import command


def must_run(*words: str | pathlib.Path, cwd: pathlib.Path, given: str | None = None) -> str:
    """Returns what a program prints, without the checkout on its path."""
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300,
        input=given,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, directory: pathlib.Path) -> pathlib.Path:
    """Returns the file that pip would install, built with the build backend of the lock.

    Args:
        kind: 'wheel', or 'editable' for the one that leads to this checkout.
        directory: where it is written.
    """
    code = f'import sys, hatchling.build as b; print(b.build_{kind}(sys.argv[1]))'
    name = must_run(sys.executable, '-c', code, directory, cwd=command.ROOT).split()[-1]
    return directory / name


def environment(wheel: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """Returns the Python of a fresh environment with a wheel in it, and the libraries of this one.

    Args:
        wheel: what `build` returned.
        directory: where the environment is made.
    """
    venv = directory / 'venv'
    must_run(sys.executable, '-m', 'venv', '--without-pip', venv, cwd=directory)
    python = venv / 'bin' / 'python'
    where = 'import sysconfig; print(sysconfig.get_paths()["purelib"])'
    site = pathlib.Path(must_run(python, '-c', where, cwd=venv).strip())
    # A wheel of pure Python is installed by unpacking it.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / 'libraries.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
    return python
