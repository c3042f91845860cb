# SPDX-License-Identifier: Apache-2.0
"""Who may import whom."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

from tests.command import ROOT

PACKAGES = ('trainer', 'models', 'data', 'configs', 'launch', 'tests')
HEAVY = ('jax', 'flax', 'optax', 'orbax', 'clu', 'tensorflow', 'tensorflow_datasets')

# Place -> what it must not import (at any depth in the file, or at import time where so said).
FORBIDDEN = {
    'trainer/config': (*HEAVY, 'trainer.step', 'trainer.trainer', 'trainer.experiment'),
    'trainer/modules': ('trainer.trainer', 'trainer.experiment', 'trainer.step'),
    'trainer/step': (
        'trainer.trainer',
        'trainer.experiment',
        'trainer.observe',
        'trainer.checkpoint',
    ),
    'trainer/observe': ('trainer.trainer', 'trainer.experiment'),
    'trainer/checkpoint': ('trainer.trainer', 'trainer.experiment'),
    'trainer/parallel': ('trainer.trainer', 'trainer.experiment'),
    'trainer': ('models', 'data', 'configs', 'tests', 'tensorflow'),
    'models': ('trainer', 'data', 'configs'),
    'data': ('trainer', 'models', 'configs', 'jax', 'flax', 'tensorflow'),
    'configs': ('trainer', 'models', 'data', *HEAVY),
    'launch': (*HEAVY, 'trainer'),
}
# What one file is for.
EXCEPTIONS = {('data/tf_data.py', 'tensorflow')}


def imports(path: pathlib.Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('place', FORBIDDEN)
def test_forbidden_imports(place: str) -> None:
    for path in (ROOT / place).rglob('*.py'):
        for name in imports(path):
            for forbidden in FORBIDDEN[place]:
                if (path.relative_to(ROOT).as_posix(), forbidden) in EXCEPTIONS:
                    continue
                assert name != forbidden and not name.startswith(f'{forbidden}.'), (path, name)


def test_every_file_names_its_licence() -> None:
    files = [
        p for package in PACKAGES for p in (ROOT / package).rglob('*') if p.suffix in ('.py', '.sh')
    ]
    assert len(files) > 60
    for path in files:
        assert 'SPDX-License-Identifier: Apache-2.0' in path.read_text()[:120], path
