# SPDX-License-Identifier: Apache-2.0
"""A missing module whose file is not where Python looks: the message says what to do."""

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
    """A repository with modules of unique names; Python looks in its root."""
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


def test_a_file_next_to_the_config(root: pathlib.Path) -> None:
    message = load(root / 'cups' / 'config.py', 'import base')
    assert message.endswith(f'line 2). The full name of {root}/cups/base.py is cups.base.')


@pytest.mark.parametrize('name', ['cups.net', 'dishes.net'])
def test_a_start_in_a_subdirectory(
    name: str, root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / 'notes')
    file = name.replace('.', '/') + '.py'
    message = resolve(f'{name}:Net')
    assert message == (
        f"config.model.target: '{name}:Net': there is no module '{name}'. Python does not look for "
        f'modules in {root}, where {file} is: start in that directory or add it to the path '
        f'(PYTHONPATH={root}).'
    )


def test_a_top_level_package_whose_folder_is_elsewhere(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`import cups.base` fails with the name `cups` if there is no such package on the path."""
    monkeypatch.chdir(root / 'notes')
    message = load(root / 'a.py', 'import cups.base')
    assert f"No module named 'cups' ({root}/a.py, line 2). Python does not look for" in message
    assert f'modules in {root}, where cups is' in message


def test_a_config_in_another_directory(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    """The folder of the config and its parents are searched for the modules of its targets."""
    monkeypatch.chdir(tmp_path_factory.mktemp('home'))
    (root / 'notes' / 'far.py').write_text(CONFIG.format(''))
    loading.load(str(root / 'notes' / 'far.py'))
    assert f'start in that directory or add it to the path (PYTHONPATH={root})' in resolve(
        'cups.net:Net'
    )


def test_a_package_in_a_subdirectory(root: pathlib.Path) -> None:
    message = load(root / 'cups' / 'deep.py', 'import parts.ring')
    assert message.endswith(
        f'start in that directory, add it to the path (PYTHONPATH={root}/cups) or name the module '
        'cups.parts.'
    )


def test_a_file_that_hides_a_folder(root: pathlib.Path) -> None:
    (root / 'cups.py').write_text('')
    message = resolve('cups.net:Net')
    assert message.endswith(f'{root}/cups.py hides {root}/cups/net.py: rename one of the two.')


def test_a_package_of_a_library_that_hides_a_folder(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    library = tmp_path_factory.mktemp('library')
    (library / 'cups').mkdir()
    (library / 'cups' / '__init__.py').write_text('')
    monkeypatch.syspath_prepend(str(library))
    message = resolve('cups.net:Net')
    assert message.endswith(
        f'{library}/cups/__init__.py hides {root}/cups/net.py: add an empty file '
        f'{root}/cups/__init__.py.'
    )


def test_a_bundled_config_has_its_full_name(root: pathlib.Path) -> None:
    """Python finds `configs.mnist` in a checkout, but not next to a user's package `configs`."""
    (root / 'configs').mkdir()
    (root / 'configs' / '__init__.py').write_text('')
    message = load(root / 'a.py', 'import configs.mnist_mlp')
    assert message.endswith('line 2). Did you mean trainer.configs.mnist_mlp?')


def test_a_module_that_does_not_exist(root: pathlib.Path) -> None:
    del root
    assert misplaced.hint('saucers.net') == ''
    assert resolve('saucers.net:Net').endswith("there is no module 'saucers.net'.")
    assert misplaced.hint('n' * 5000) == ''
