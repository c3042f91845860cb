# SPDX-License-Identifier: Apache-2.0
"""Objects by name: what a wrong name means, and modules that fail to import."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

from tests.command import ROOT
from trainer.config import objects
from trainer.config.errors import UserError


def test_a_module_that_fails_to_import_is_named_with_its_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'broken_module.py').write_text('x = 1\ny = undefined\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r'NameError: .*broken_module\.py, line 2'):
        objects.resolve('broken_module:Thing', 'config.model.target')


@pytest.mark.parametrize(
    ('name', 'fix'),
    [
        ('optax:sdg', 'optax:sgd'),
        ('optx:sgd', 'optax:sgd'),
        ('data.transfroms:ToFloat', 'trainer.data.transforms:ToFloat'),
        ('trainer.data.transfroms:ToFloat', 'trainer.data.transforms:ToFloat'),
        ('models.mpl:MLP', 'trainer.models.mlp:MLP'),
        ('trainer.task:Classification', 'trainer.tasks:Classification'),
        ('trainer.tasks.task:Classification', 'trainer.tasks:Classification'),
        ('trainer.tasks.tsk:Classification', 'trainer.tasks:Classification'),
    ],
)
def test_misspelled_names(name: str, fix: str) -> None:
    objects.resolve(fix, 'config.x.target')
    with pytest.raises(UserError) as error:
        objects.resolve(name, 'config.x.target')
    assert str(error.value).startswith(f'config.x.target: {name!r}: ')
    assert str(error.value).endswith(f'Did you mean {fix}?')


@pytest.mark.parametrize('name', ['', ':', 'optax:', ':sgd', 'optax:a:b', 3, None])
def test_malformed_names(name: object) -> None:
    with pytest.raises(UserError, match=r"config\.x: expected 'package\.module:Name'"):
        objects.resolve(name, 'config.x')


def test_dotted_attributes() -> None:
    assert objects.resolve('collections:OrderedDict.fromkeys', 'x')(('a',)) == {'a': None}


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('x = 1\nimport no_such_dependency\n', 'ModuleNotFoundError: .*broken.py, line 2'),
        ('x = (\n', 'SyntaxError: .*broken.py, line 1'),
        ('def f():\n    return 1 / 0\n\nf()\n', 'ZeroDivisionError: .*broken.py, line 2'),
    ],
)
def test_failing_imports(tmp_path: pathlib.Path, text: str, message: str) -> None:
    """The message has the line that failed; a missing dependency is not a missing target."""
    (tmp_path / 'broken.py').write_text(text)
    code = (
        f'import sys; sys.path.append({str(ROOT)!r})\n'
        'from trainer.config import errors, objects\n'
        'try:\n'
        "    objects.resolve('broken:Thing', 'config.model.target')\n"
        'except errors.UserError as error:\n'
        '    print(error)\n'
    )
    finished = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 0, finished.stderr
    assert re.match('config.model.target: importing broken failed: ' + message, finished.stdout)
    assert 'Traceback' not in finished.stdout
    assert len(finished.stdout.splitlines()) == 1
