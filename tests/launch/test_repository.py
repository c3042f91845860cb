# SPDX-License-Identifier: Apache-2.0
"""The repository of `docs/howto/repository.md`, in an empty directory, with each installation."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests import command
from tests.launch import installed
from tests.pages import FILES, PAGES, TEXTS

pytestmark = pytest.mark.slow

WAYS = ('checkout', 'wheel', 'editable')
PAGE = 'docs/howto/repository'
OWN = [
    name
    for name in FILES
    if any(b.page == PAGE and f'# {name}\n' in b.text for b in PAGES[PAGE].blocks)
]


@pytest.fixture(scope='module')
def pythons(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns the Python of one of `WAYS`; each is made once."""

    @functools.cache
    def make_python(way: str) -> str:
        if way == 'checkout':
            return sys.executable  # `command.run` gives it the checkout as its path.
        file = installed.build(way, tmp_path_factory.mktemp('dist'))
        return str(installed.environment(file, tmp_path_factory.mktemp('environment')))

    return make_python


@pytest.fixture(params=WAYS)
def python(request: pytest.FixtureRequest, pythons: Callable[[str], str]) -> str:
    return pythons(request.param)


@pytest.fixture
def wheel(pythons: Callable[[str], str]) -> str:
    return pythons('wheel')


@pytest.fixture
def repository(tmp_path: pathlib.Path) -> pathlib.Path:
    """The files of the page, and nothing else."""
    root = tmp_path / 'my_rings'
    for name in OWN:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(FILES[name])
    return root


def run(python: str, cwd: pathlib.Path, *args: str) -> str:
    """Returns what a command prints, after its success."""
    finished = command.run(*args, cwd=cwd, python=python)
    assert finished.code == 0, finished.err
    return finished.out


def fail(python: str, cwd: pathlib.Path, *args: str) -> str:
    """Returns the message of a command that fails."""
    finished = command.run(*args, cwd=cwd, python=python)
    assert finished.code != 0, finished.out
    return finished.err


def test_the_page_shows_a_whole_repository() -> None:
    assert set(OWN) == {
        'configs/common.py', 'configs/mnist_wide.py', 'configs/rings.py', 'data/rings.py',
        'models/net.py',
    }  # fmt: skip
    [layout] = [text for text in TEXTS if text.startswith('my_rings/')]
    for name in OWN:
        assert name.partition('/')[0] + '/' in layout and name.partition('/')[2] in layout


def test_it_trains(python: str, repository: pathlib.Path) -> None:
    """Own folders without `__init__.py`; `run.json` names the commit of the repository."""
    author = ('-c', 'user.name=a', '-c', 'user.email=a@b.c')
    for words in (('init', '-q'), ('add', '.'), (*author, 'commit', '-q', '-m', 'all')):
        subprocess.run(['git', *words], cwd=repository, check=True)
    assert 'finished at step 200' in run(python, repository, '--config=rings')
    workdir = repository / 'runs' / 'rings'
    assert command.result(workdir)['metrics']['eval/dev/accuracy'] > 0.95
    git = json.loads((workdir / 'run.json').read_text())['git']
    assert (git['directory'], git['dirty'], len(git['commit'])) == (str(repository), False, 40)
    assert {path.name for path in repository.iterdir()} == {
        '.git', 'configs', 'data', 'models', 'runs',
    }  # fmt: skip


def test_packages_and_the_names_of_bundled_files(python: str, repository: pathlib.Path) -> None:
    """Own packages with `__init__.py`, and a file of theirs with the name of one of ours."""
    for folder in ('configs', 'data', 'models'):
        (repository / folder / '__init__.py').write_text('')
    (repository / 'models' / 'net.py').rename(repository / 'models' / 'mlp.py')
    target = '--config.model.target=models.mlp:Net'
    out = run(python, repository, '--config=rings', target, '--mode=summary')
    assert '2 x 64' in out
    out = run(python, repository, '--config=mnist_wide', '--mode=config')
    assert 'model.features = (256, 10)' in out


def test_modules_instead_of_packages(python: str, repository: pathlib.Path) -> None:
    """A `data.py` and a `models.py`, and the config beside them."""
    for old, new in (('data/rings.py', 'data.py'), ('models/net.py', 'models.py')):
        (repository / old).rename(repository / new)
        (repository / old).parent.rmdir()
    text = FILES['configs/common.py'].replace('def rings(hidden)', 'def get_config(hidden=8)')
    text = text.replace('data.rings:', 'data:').replace('models.net:', 'models:')
    (repository / 'mine.py').write_text(text)
    out = run(python, repository, '--config=mine.py', '--config.model.hidden=9', '--mode=summary')
    assert '2 x 9' in out


def test_a_config_in_another_folder(python: str, repository: pathlib.Path) -> None:
    (repository / 'experiments').mkdir()
    (repository / 'configs' / 'rings.py').rename(repository / 'experiments' / 'a.py')
    out = run(python, repository, '--config=experiments/a.py', '--mode=config')
    assert 'model.hidden = 64' in out


def test_a_start_in_a_sub_directory(python: str, repository: pathlib.Path) -> None:
    """An error that names the directory; with that in PYTHONPATH it works."""
    below = repository / 'notebooks'
    below.mkdir()
    said = fail(python, below, '--config=../configs/rings.py', '--mode=config')
    assert said.startswith('Error: ../configs/rings.py fails to import: ')
    assert f'Python does not look for modules in {repository}, where configs' in said
    assert f'(PYTHONPATH={repository}).' in said
    assert 'Traceback' not in said
    paths = [command.environment(python).get('PYTHONPATH', ''), str(repository)]
    done = subprocess.run(
        [python, '-m', 'trainer.main', '--config=../configs/rings.py', '--mode=config'],
        cwd=below, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))},
    )  # fmt: skip
    assert 'model.hidden = 64' in done.stdout, done.stderr


NOTEBOOK = """
import os
from trainer import Trainer, load_and_build
from trainer.config.errors import UserError
try:
    load_and_build('../configs/rings.py')
except UserError as error:
    print(error)
os.chdir('..')
import flax.linen as nn
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)
options = {'train_for': '2 steps', 'evals': {}, 'model': {'target': '__main__:Net'}}
print(Trainer(load_and_build('configs/rings.py', **options)).fit().status)
"""


def test_a_notebook_in_a_folder_of_its_own(wheel: str, repository: pathlib.Path) -> None:
    """Code that, like a notebook's, looks for modules in the current directory."""
    (repository / 'notebooks').mkdir()
    out = installed.must_run(wheel, '-', cwd=repository / 'notebooks', given=NOTEBOOK)
    assert f'Python does not look for modules in {repository}, where configs' in out
    assert out.splitlines()[-1] == 'finished'


def test_a_file_called_trainer(wheel: str, repository: pathlib.Path) -> None:
    """Python's own words, which the page quotes: none of our code has run by then."""
    [quoted] = [text for text in TEXTS if '__path__ attribute not found' in text]
    error, missing, notebook = quoted.splitlines()
    (repository / 'trainer.py').write_text('')
    assert error in fail(wheel, repository, '--config=rings')
    with pytest.raises(AssertionError, match=notebook):
        installed.must_run(wheel, '-c', 'from trainer import Trainer', cwd=repository)
    (repository / 'trainer.py').unlink()
    (repository / 'trainer').mkdir()
    assert "'models.net:Net'" in run(wheel, repository, '--config=rings', '--mode=config')
    (repository / 'trainer' / '__init__.py').write_text('')
    assert missing in fail(wheel, repository, '--config=rings')
