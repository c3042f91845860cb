# SPDX-License-Identifier: Apache-2.0
"""The wheel trains beside a user's own `models/`, `data/` and `configs/`."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests import command

pytestmark = pytest.mark.slow


def must_run(*words: str | pathlib.Path, cwd: pathlib.Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Built as `pip wheel .` does, with the build backend of the lock."""
    directory = tmp_path_factory.mktemp('dist')
    build = 'import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))'
    name = must_run(sys.executable, '-c', build, directory, cwd=command.ROOT).split()[-1]
    return directory / name


@pytest.fixture(scope='module')
def python(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A fresh environment with the wheel in it, and the libraries of this one."""
    venv = tmp_path_factory.mktemp('environment') / 'venv'
    must_run(sys.executable, '-m', 'venv', '--without-pip', venv, cwd=venv.parent)
    found = venv / 'bin' / 'python'
    where = 'import sysconfig; print(sysconfig.get_paths()["purelib"])'
    site = pathlib.Path(must_run(found, '-c', where, cwd=venv).strip())
    # A wheel of pure Python is installed by unpacking it.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / 'libraries.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
    return found


def test_what_the_wheel_holds(wheel: pathlib.Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split('/')[0] for name in names}
    assert {top for top in tops if not top.endswith('.dist-info')} == {'trainer'}
    assert not [n for n in names if '__pycache__' in n or 'test' in n or n.endswith('.sh')]
    for name in ('models/cnn.py', 'data/mnist/train-images-idx3-ubyte.gz', 'configs/mnist.py'):
        assert f'trainer/bundled/{name}' in names
    assert any(name.endswith('licenses/LICENSE') for name in names)


@pytest.mark.parametrize('config', ['configs/mnist.py', 'configs/mnist_mlp.py'])
def test_it_trains_beside_packages_of_the_same_names(
    config: str, python: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for package in ('models', 'data', 'configs'):
        (tmp_path / package).mkdir()
        (tmp_path / package / '__init__.py').write_text('"""The user\'s own."""\n')
    out = must_run(
        python, '-m', 'trainer.main', f'--config={config}', '--config.train_for=3steps',
        cwd=tmp_path,
    )  # fmt: skip
    assert 'finished at step 3' in out
    assert 'examples 10,000' in out


def test_the_user_s_own_model_is_found(python: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models' / '__init__.py').write_text('')
    (tmp_path / 'models' / 'mine.py').write_text(
        'from trainer.bundled.models.mlp import MLP\n\n\nclass Mine(MLP):\n    pass\n'
    )
    out = must_run(
        python, '-m', 'trainer.main', '--config=configs/mnist_mlp.py', '--config.train_for=3steps',
        '--config.model.target=models.mine:Mine', cwd=tmp_path,
    )  # fmt: skip
    assert 'finished at step 3' in out
