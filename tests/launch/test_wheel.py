# SPDX-License-Identifier: Apache-2.0
"""The wheel offers the same names as the checkout, next to packages of the user."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import sys
import zipfile

import pytest

from tests import command
from tests.launch import installed
from tests.launch.installed import must_run
from tests.pages import BLOCKS, PAGES, Project
from tests.test_page_commands import SCRIPTS, require_packages

pytestmark = pytest.mark.slow


# Resolves names like a config, and runs imports like a script, in a checkout or with a wheel.
CHECK = """
import json, sys
from trainer.config import bundled, loading, objects


def names(node):
    if isinstance(node, dict):
        yield from (node[key] for key in ('target', 'ref') if key in node)
        node = list(node.values())
    for value in node if isinstance(node, (list, tuple)) else ():
        yield from names(value)


shown = json.load(sys.stdin)
for name in shown['names']:
    objects.resolve(name, 'shown')
for statement in shown['imports']:
    exec(statement)
files = sorted((bundled.FOLDER / 'configs').glob('[!_]*.py'))
for file in files:
    for spec in (file.stem, f'configs/{file.name}'):
        loaded = loading.load(spec)
        assert loaded.path == file, spec
    for name in names(loading.to_plain(loaded.config)):
        objects.resolve(name, file.name)
loaded = {name: module for name, module in sys.modules.items() if not name.startswith('_config_')}
paths = [getattr(module, '__file__', None) or '' for module in loaded.values()]
prefix = str(bundled.FOLDER) + '/'
ours = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
# A checkout may have an environment of its own, with modules that libraries load twice.
ours = [path for path in ours if 'site-packages' not in path]
print(bundled.FOLDER)
print(len(files), len(ours), len(set(ours)))
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return installed.build('wheel', tmp_path_factory.mktemp('dist'))


@pytest.fixture(scope='module')
def python(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return installed.environment(wheel, tmp_path_factory.mktemp('environment'))


def test_contents_of_the_wheel(wheel: pathlib.Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split('/')[0] for name in names}
    assert {top for top in tops if not top.endswith('.dist-info')} == {'trainer'}
    unwanted = re.compile(r'__pycache__|(^|/)tests?[/_]|\.sh$')
    assert not [name for name in names if unwanted.search(name)]
    for name in (
        '__init__.pyi',
        'models/cnn.py',
        'models/__init__.py',
        'data/mnist/train-images-idx3-ubyte.gz',
        'data/elpv_test.txt',
        'data/sentiment/splits.tsv',
        'data/treebank/web.conllu.gz',
        'data/verses/en_es.tsv.gz',
        'configs/mnist.py',
        'configs/__init__.py',
    ):
        assert f'trainer/{name}' in names
    assert any(name.endswith('licenses/LICENSE') for name in names)


@pytest.mark.parametrize('config', ['configs/mnist.py', 'configs/mnist_mlp.py'])
def test_wheel_trains_next_to_packages_of_the_same_names(
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


def shown_names() -> list[str]:
    """Returns each name such as 'trainer.tasks:Classification' on the pages."""
    text = '\n'.join(page.text for page in PAGES.values())
    return sorted(set(re.findall(r'\btrainer(?:\.\w+)*:[A-Za-z_]\w*', text)))


def shown_imports() -> list[str]:
    """Returns each import statement in files and scripts of the pages."""
    trees = [ast.parse(block.text) for block in BLOCKS if block.kind == 'python']
    found = {
        ast.unparse(node)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    return sorted(found)


@pytest.mark.parametrize('place', ['checkout', 'wheel'])
def test_documented_names_exist(place: str, python: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """In an empty directory, but for the files of the pages; no module is loaded twice."""
    Project(tmp_path)
    names, imports = shown_names(), shown_imports()
    assert len(names) > 40
    assert 'from trainer.models.mlp import MLP' in imports
    code = CHECK
    if place == 'checkout':
        code = f'import sys; sys.path.insert(1, {str(command.ROOT)!r})\n{CHECK}'
    given = json.dumps({'names': names, 'imports': imports})
    out = must_run(
        python if place == 'wheel' else sys.executable, '-c', code, cwd=tmp_path, given=given
    )
    folder, counts = out.splitlines()[-2:]
    assert (folder == str(command.ROOT)) == (place == 'checkout')
    configs, modules, files = map(int, counts.split())
    assert configs == len(list((command.ROOT / 'configs').glob('*.py')))
    assert modules == files > 50


@pytest.fixture(scope='module')
def project(python: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp('project'), str(python))


@pytest.mark.parametrize('name', SCRIPTS)
def test_script_of_the_pages_runs(name: str, project: Project) -> None:
    require_packages(name)
    assert re.fullmatch(SCRIPTS[name], project.script(name).splitlines()[-1])


def test_package_runs_as_a_program_with_short_names(
    python: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = must_run(python, '-m', 'trainer', '--config=mnist', '--mode=config', cwd=tmp_path)
    assert "model.target = 'trainer.models.cnn:CNN'" in out
