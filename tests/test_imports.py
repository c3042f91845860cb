# SPDX-License-Identifier: Apache-2.0
"""Imports go down only, and each folder imports only what it may."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

from tests.command import ROOT

PACKAGES = ('trainer', 'models', 'data', 'configs', 'launch', 'tests')
HEAVY = ('jax', 'flax', 'optax', 'orbax', 'clu', 'tensorflow', 'tensorflow_datasets')

# The rooms of trainer/ from top to bottom. A file imports from its own room and from those below,
# in functions and under TYPE_CHECKING too.
LAYERS = (
    ('__main__',),
    ('main',),
    ('modes',),
    # The public doors; nothing imports them.
    ('__init__', 'sharding', 'schedules', 'metrics', 'summaries', 'models', 'data', 'configs'),
    ('trainer',),
    ('inspect',),
    ('run',),
    ('experiment',),
    ('hooks',),
    ('builders',),
    ('weights',),
    ('ensemble',),
    ('evaluate',),
    ('step',),
    ('tasks',),
    ('input',),
    ('checkpoint',),
    ('observe',),
    ('parallel',),
    ('klinen',),
    ('modules',),
    ('config',),
    ('compat',),
)

DOORS = LAYERS[3][1:]

# Place -> what it must not import, at any depth in the file.
FORBIDDEN = {
    'trainer/config': HEAVY,
    'trainer': ('models', 'data', 'configs', 'tests', 'tensorflow'),
    'models': ('trainer', 'data', 'configs'),
    'data': ('trainer', 'models', 'configs', 'jax', 'flax', 'tensorflow'),
    'configs': ('trainer', 'models', 'data', *HEAVY),
    'launch': (*HEAVY, 'trainer'),
}
# What one file is for.
EXCEPTIONS = {('data/tf_data.py', 'tensorflow')}

# Below builders/, of config/ only what knows no section of a config.
SECTIONS = ('sections', 'schema', 'targets', 'paths', 'overrides', 'loading')
BELOW_BUILD = [room for layer in LAYERS[10:-2] for room in layer]


def imports(path: pathlib.Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def modules() -> dict[str, pathlib.Path]:
    """Returns the files of trainer/ by module name."""
    found = {}
    for path in (ROOT / 'trainer').rglob('*.py'):
        parts = path.relative_to(ROOT).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


def graph() -> dict[str, set[str]]:
    """Returns, for each module of trainer/, the modules that it imports."""
    files = modules()
    edges: dict[str, set[str]] = {}
    for name, path in files.items():
        whole = {
            target if target in files else target.rpartition('.')[0] for target in imports(path)
        }
        edges[name] = {target for target in whole if target in files and target != name}
    return edges


def room_of(module: str) -> str:
    return module.split('.')[1] if '.' in module else '__init__'


def test_imports_go_down() -> None:
    depth = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    upwards = [
        f'{name} -> {target}'
        for name, targets in graph().items()
        for target in targets
        if target != 'trainer' and depth[room_of(name)] > depth[room_of(target)]
    ]
    assert not upwards, upwards


def test_no_module_imports_the_public_modules() -> None:
    doors = {'trainer', *(f'trainer.{room}' for room in DOORS)}
    found = [(n, t) for n, targets in graph().items() for t in targets & doors if n not in doors]
    assert not found


def test_there_are_no_import_cycles() -> None:
    edges = graph()
    left = {name: set(targets) for name, targets in edges.items()}
    while leaves := {name for name, targets in left.items() if not targets}:
        left = {name: targets - leaves for name, targets in left.items() if name not in leaves}
    assert not left, {name: sorted(targets) for name, targets in left.items()}


def test_rooms_below_the_builders_do_not_read_the_config() -> None:
    known = {f'trainer.config.{name}' for name in SECTIONS}
    for name, targets in graph().items():
        if room_of(name) in BELOW_BUILD:
            assert not targets & known, (name, targets & known)


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
