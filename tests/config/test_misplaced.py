# SPDX-License-Identifier: Apache-2.0
"""A module whose file is near, but not where Python looks: the message says what to do."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest

from trainer.config import loading, misplaced, objects
from trainer.config.errors import UserError

CONFIG = (
    'import ml_collections\n{}\n\n\ndef get_config():\n    return ml_collections.ConfigDict()\n'
)


@pytest.fixture
def root(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A repository with modules whose names nothing else has; Python looks in its root."""
    for path in ('cups/net.py', 'cups/parts/ring.py', 'dishes/__init__.py', 'dishes/net.py'):
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text('class Net: ...\n')
    (tmp_path / 'cups' / 'base.py').write_text('x = 1\n')
    (tmp_path / 'notes').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend('')
    for name in [n for n in sys.modules if n.partition('.')[0] in ('cups', 'dishes', 'configs')]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def load(path: pathlib.Path, line: str) -> str:
    path.write_text(CONFIG.format(line))
    with pytest.raises(UserError) as raised:
        loading.load(str(path))
    return str(raised.value)


def resolve(name: str) -> str:
    with pytest.raises(UserError) as raised:
        objects.resolve(name, 'config.model.target')
    return str(raised.value)


def test_a_file_beside_the_config(root: pathlib.Path) -> None:
    said = load(root / 'cups' / 'config.py', 'import base')
    assert said.endswith(f'line 2). The full name of {root}/cups/base.py is cups.base.')


@pytest.mark.parametrize('name', ['cups.net', 'dishes.net'])
def test_a_start_in_a_sub_directory(
    name: str, root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / 'notes')
    file = name.replace('.', '/') + '.py'
    said = resolve(f'{name}:Net')
    assert said == (
        f"config.model.target: '{name}:Net': there is no module '{name}'. Python does not look for "
        f'modules in {root}, where {file} is: start in that directory or add it to the path '
        f'(PYTHONPATH={root}).'
    )


def test_a_folder_alone_is_enough(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`import cups.base` fails at `cups`, if nothing of that name is on the path."""
    monkeypatch.chdir(root / 'notes')
    said = load(root / 'a.py', 'import cups.base')
    assert f"No module named 'cups' ({root}/a.py, line 2). Python does not look for" in said
    assert f'modules in {root}, where cups is' in said


def test_a_config_somewhere_else(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    """Its folder, and those above, are where its targets may be."""
    monkeypatch.chdir(tmp_path_factory.mktemp('home'))
    (root / 'notes' / 'far.py').write_text(CONFIG.format(''))
    loading.load(str(root / 'notes' / 'far.py'))
    assert f'start in that directory or add it to the path (PYTHONPATH={root})' in resolve(
        'cups.net:Net'
    )


def test_a_package_deeper_down(root: pathlib.Path) -> None:
    said = load(root / 'cups' / 'deep.py', 'import parts.ring')
    assert said.endswith(
        f'start in that directory, add it to the path (PYTHONPATH={root}/cups) or name the module '
        'cups.parts.'
    )


def test_a_file_that_hides_a_folder(root: pathlib.Path) -> None:
    (root / 'cups.py').write_text('')
    said = resolve('cups.net:Net')
    assert said.endswith(f'{root}/cups.py hides {root}/cups/net.py: rename one of the two.')


def test_a_package_of_a_library_that_hides_a_folder(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    library = tmp_path_factory.mktemp('library')
    (library / 'cups').mkdir()
    (library / 'cups' / '__init__.py').write_text('')
    monkeypatch.syspath_prepend(str(library))
    said = resolve('cups.net:Net')
    assert said.endswith(
        f'{library}/cups/__init__.py hides {root}/cups/net.py: add an empty file '
        f'{root}/cups/__init__.py.'
    )


def test_a_bundled_config_has_its_full_name(root: pathlib.Path) -> None:
    """In a checkout Python finds `configs.mnist` too; beside a package `configs` it does not."""
    (root / 'configs').mkdir()
    (root / 'configs' / '__init__.py').write_text('')
    said = load(root / 'a.py', 'import configs.mnist_mlp')
    assert said.endswith('line 2). Did you mean trainer.configs.mnist_mlp?')


def test_a_module_that_is_nowhere(root: pathlib.Path) -> None:
    del root
    assert misplaced.hint('saucers.net') == ''
    assert resolve('saucers.net:Net').endswith("there is no module 'saucers.net'.")
    assert misplaced.hint('n' * 5000) == ''
