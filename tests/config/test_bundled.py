# SPDX-License-Identifier: Apache-2.0
"""The names of bundled models and data, also next to a user's packages of the same names."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.command import ROOT

# Prints, for each name, its module and file, or the error.
SHOW = """
import sys
from trainer.config import errors, objects
for name in sys.argv[1:]:
    try:
        found = objects.resolve(name, 'x')
        print(found.__module__, sys.modules[found.__module__].__file__)
    except errors.UserError as error:
        print(error)
twice = [name for name in sys.modules if name.split('.')[0] in ('models', 'data')]
print(sorted(twice))
"""


def resolve_in(cwd: pathlib.Path, *names: str) -> list[str]:
    """Returns a line for each name, and one with the imported modules of `models` and `data`."""
    finished = subprocess.run(
        # Isolated from what this environment has installed, such as another checkout.
        [sys.executable, '-S', '-c', SHOW, *names],
        cwd=cwd, capture_output=True, text=True, timeout=60,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), *site_packages()])},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def site_packages() -> list[str]:
    return [path for path in sys.path if path.endswith('site-packages')]


@pytest.mark.slow
@pytest.mark.parametrize('place', ['the checkout', 'elsewhere'])
def test_bundled_classes_have_only_their_full_name(place: str, tmp_path: pathlib.Path) -> None:
    """In a checkout Python finds `models/mlp.py` as `models.mlp` too, and would import it twice."""
    cwd = ROOT if place == 'the checkout' else tmp_path
    full, short, package, loaded = resolve_in(
        cwd, 'trainer.models.mlp:MLP', 'models.mlp:MLP', 'data.mnist:MNIST'
    )
    assert full == f'trainer.models.mlp {ROOT}/models/mlp.py'
    assert short == (
        "x: 'models.mlp:MLP': there is no module 'models.mlp'. Did you mean trainer.models.mlp:MLP?"
    )
    assert package.endswith('Did you mean trainer.data.mnist:MNIST?')
    assert loaded == '[]'


@pytest.mark.slow
@pytest.mark.parametrize('init', [True, False], ids=['package', 'folder'])
def test_a_users_package_does_not_conflict_with_the_bundled_one(
    init: bool, tmp_path: pathlib.Path
) -> None:
    """Even if modules have the same name, and with or without an `__init__.py`."""
    for package in ('models', 'data'):
        (tmp_path / package).mkdir()
        (tmp_path / package / 'mine.py').write_text('class Mine: ...\n')
        if init:
            (tmp_path / package / '__init__.py').write_text('')
    (tmp_path / 'models' / 'mlp.py').write_text('class MLP: ...\n')
    names = ('models.mine:Mine', 'data.mine:Mine', 'models.mlp:MLP')
    *own, ours, data, missing, _ = resolve_in(
        tmp_path, *names, 'trainer.models.mlp:MLP', 'trainer.data.mnist:MNIST', 'models.cnn:CNN'
    )
    assert own == [
        f'models.mine {tmp_path}/models/mine.py',
        f'data.mine {tmp_path}/data/mine.py',
        f'models.mlp {tmp_path}/models/mlp.py',
    ]
    assert ours == f'trainer.models.mlp {ROOT}/models/mlp.py'
    assert data == f'trainer.data.mnist {ROOT}/data/mnist/__init__.py'
    assert missing.endswith('Did you mean trainer.models.cnn:CNN?')


def test_a_module_named_data_belongs_to_the_user(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'data.py').write_text('class Mine: ...\n')
    mine, ours, _ = resolve_in(tmp_path, 'data:Mine', 'trainer.data.npz:Npz')
    assert mine == f'data {tmp_path}/data.py'
    assert ours == f'trainer.data.npz {ROOT}/data/npz.py'
