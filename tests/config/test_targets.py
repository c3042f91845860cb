# SPDX-License-Identifier: Apache-2.0
"""Names become objects; arguments are checked against signatures before anything is called."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from tests.command import ROOT
from trainer.config import targets
from trainer.config.errors import UserError

HERE = __name__


def plain(a: int, b: int = 2) -> tuple[int, int]:
    return a, b


def anything(**kwargs: Any) -> dict[str, Any]:
    return kwargs


@functools.wraps(plain)
def wrapped(*args: Any, **kwargs: Any) -> Any:
    return plain(*args, **kwargs)


partial = functools.partial(plain, b=5)


class Picky:
    def __init__(self, value: int):
        if value < 0:
            raise ValueError(f'value {value} is negative')


def make(name: str, **node: Any) -> Any:
    return targets.instantiate({'target': f'{HERE}:{name}', **node}, 'config.x')


def test_objects_nest() -> None:
    inner = {'target': f'{HERE}:plain', 'a': 1}
    assert make('plain', a=inner, b=[inner, ({'ref': f'{HERE}:plain'},)]) == (
        (1, 2), [(1, 2), (plain,)],
    )  # fmt: skip
    assert make('plain', args=(7,)) == (7, 2)
    assert make('wrapped', a=3) == (3, 2)
    assert make('partial', a=3) == (3, 5)
    assert make('anything', c=1, accepts_any=True) == {'c': 1}


@pytest.mark.parametrize(
    ('name', 'node', 'message'),
    [
        ('plain', {'a': 1, 'bb': 2}, r"config\.x\.bb: .* takes no argument 'bb'"),
        ('wrapped', {'a': 1, 'c': 2}, r'config\.x\.c'),
        ('plain', {}, r'config\.x\.a is missing'),
        ('plain', {'a': 1, 'args': (2,)}, r'config\.x\.a is given twice'),
        ('anything', {'c': 1}, 'accepts_any=True'),
        ('Picky', {'value': -1}, r'config\.x: .*Picky refused its arguments: value -1 is negative'),
        ('plian', {'a': 1}, 'Did you mean .*:plain?'),
    ],
)
def test_what_does_not_fit(name: str, node: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(name, **node)


@pytest.mark.parametrize(
    ('node', 'message'),
    [
        ({'target': 'nowhere.at.all:X'}, "no module 'nowhere.at.all'"),
        ({'target': 'optax'}, "expected 'package.module:Name'"),
        ({'ref': 'optax:sgd', 'learning_rate': 1}, 'takes no other key'),
        ({'target': 'math:pi'}, 'is not callable'),
    ],
)
def test_bad_names(node: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        targets.instantiate(node, 'config.x')


def test_a_module_that_fails_to_import_is_named_with_its_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'broken_module.py').write_text('x = 1\ny = undefined\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r'NameError: .*broken_module\.py, line 2'):
        targets.resolve('broken_module:Thing', 'config.model.target')


def test_the_users_own_models_package_does_not_hide_ours(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models' / '__init__.py').write_text('')
    (tmp_path / 'models' / 'mine.py').write_text('class Mine:\n    pass\n')
    code = (
        f'import sys; sys.path.append({str(ROOT)!r})\n'
        'from trainer.config import targets\n'
        "assert targets.resolve('models.mine:Mine', 'x').__module__ == 'models.mine'\n"
        "assert targets.resolve('models.mlp:MLP', 'x').__name__ == 'MLP'\n"
    )
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, timeout=60)
