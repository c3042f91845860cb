# SPDX-License-Identifier: Apache-2.0
"""Imports go down only, and each folder imports only what it may."""

from __future__ import annotations

import ast
import functools
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
    (
        '__init__',
        'sharding',
        'schedules',
        'metrics',
        'scores',
        'summaries',
        'device_transforms',
        'models',
        'data',
        'configs',
    ),
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

# The modules of config/ that know a section of a config; no room below builders/ reaches them, not
# even through another module of config/.
SECTIONS = ('sections', 'schema', 'targets', 'paths', 'overrides', 'loading')
BELOW_BUILD = [room for layer in LAYERS[10:-2] for room in layer]

# All that the computation imports from config/.
FROM_CONFIG = {'trainer.config.durations', 'trainer.config.errors'}
COMPUTATION = ('step', 'evaluate')


def module_of(path: pathlib.Path, root: pathlib.Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(path: pathlib.Path, root: pathlib.Path = ROOT) -> tuple[str, ...]:
    """Returns what a file imports, as 'package.module' or 'package.module.name'."""
    return _imports(path, root, path.read_text())


@functools.cache
def _imports(path: pathlib.Path, root: pathlib.Path, text: str) -> tuple[str, ...]:
    return tuple(_find_imports(path, root, text))


def _find_imports(path: pathlib.Path, root: pathlib.Path, text: str) -> Iterator[str]:
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One level is the file's own package; each further level, the package around it.
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = '.'.join([*base, *([node.module] if node.module else [])])
            yield from (f'{module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Call) and _called_name(node) == 'import_module':
            yield from (
                argument.value
                for argument in node.args[:1]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            )


def _called_name(call: ast.Call) -> str | None:
    return getattr(call.func, 'attr', getattr(call.func, 'id', None))


def packages_of(module: str) -> set[str]:
    """Returns the packages around a module."""
    parts = module.split('.')
    return {'.'.join(parts[:end]) for end in range(1, len(parts))}


def graph(root: pathlib.Path = ROOT) -> dict[str, set[str]]:
    """Returns, for each module of trainer/, the modules that it imports.

    To import a module also runs `__init__.py` of the packages around it, except for those that
    the importing module is in: they run already.
    """
    files = {module_of(path, root): path for path in (root / 'trainer').rglob('*.py')}
    edges: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = set()
        for imported in imports(path, root):
            # The rest of the path is a name in the module, or a file outside of trainer/.
            known = files.keys() & {imported, *packages_of(imported)}
            if known:
                target = max(known, key=len)
                targets |= {target} | (packages_of(target) & files.keys()) - packages_of(name)
        edges[name] = targets - {name}
    return edges


def room_of(module: str) -> str:
    return module.split('.')[1] if '.' in module else '__init__'


def upwards(edges: dict[str, set[str]]) -> list[str]:
    """Returns the imports of a higher room, as 'module -> module'."""
    depth = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    return [
        f'{name} -> {target}'
        for name, targets in edges.items()
        for target in targets
        if target != 'trainer' and depth[room_of(name)] > depth[room_of(target)]
    ]


def cycles(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Returns the edges that are left without the modules that lead to no cycle."""
    left = {name: set(targets) for name, targets in edges.items()}
    while leaves := {name for name, targets in left.items() if not targets}:
        left = {name: targets - leaves for name, targets in left.items() if name not in leaves}
    return left


def reach(edges: dict[str, set[str]], name: str, *, room: str) -> set[str]:
    """Returns the modules of a room that a module imports, directly or through others of it."""
    found: set[str] = set()
    left = [name]
    while left:
        new = {target for target in edges[left.pop()] if room_of(target) == room} - found
        found |= new
        left += new
    return found


def test_imports_go_down() -> None:
    found = upwards(graph())
    assert not found, found


def test_no_module_imports_the_public_modules() -> None:
    doors = {'trainer', *(f'trainer.{room}' for room in DOORS)}
    found = [(n, t) for n, targets in graph().items() for t in targets & doors if n not in doors]
    assert not found


def test_there_are_no_import_cycles() -> None:
    left = cycles(graph())
    assert not left, {name: sorted(targets) for name, targets in left.items()}


FROM_STEP = {
    'relative': ('trainer/step/a.py', 'from ..run import b', 'trainer.run.b'),
    'relative, of a package': ('trainer/step/a.py', 'from .. import run', 'trainer.run'),
    'relative, of a name': ('trainer/step/a.py', 'from ..run.b import C', 'trainer.run.b'),
    'bundled': (
        'trainer/step/a.py', 'from trainer.models.cnn import CNN', 'trainer.models'
    ),
    'by import_module': (
        'trainer/step/a.py', "import importlib\nimportlib.import_module('trainer.run.b')",
        'trainer.run.b',
    ),
    'by its function alone': (
        'trainer/step/a.py', "def f(): import_module('trainer.run.b')", 'trainer.run.b'
    ),
    'of a package': ('trainer/step/__init__.py', 'from trainer.run import b', 'trainer.run.b'),
    'of a package, relative': ('trainer/step/__init__.py', 'from ..run import b', 'trainer.run.b'),
}  # fmt: skip


def write_package(root: pathlib.Path, sources: dict[str, str]) -> None:
    for room in ('.', 'run', 'step', 'models', 'modes', 'modes/plan'):
        (root / 'trainer' / room).mkdir(exist_ok=True)
        (root / 'trainer' / room / '__init__.py').touch()
    for file, text in {'trainer/run/b.py': '', **sources}.items():
        (root / file).write_text(text)


@pytest.mark.parametrize('kind', FROM_STEP)
def test_the_check_finds_imports_that_go_up(tmp_path: pathlib.Path, kind: str) -> None:
    file, text, target = FROM_STEP[kind]
    write_package(tmp_path, {file: text})
    name = module_of(tmp_path / file, tmp_path)
    assert f'{name} -> {target}' in upwards(graph(tmp_path))


def test_the_check_finds_cycles_through_a_package(tmp_path: pathlib.Path) -> None:
    """`dispatch` imports a module of the package whose `__init__` imports `dispatch`."""
    sources = {
        'trainer/modes/plan/__init__.py': 'from trainer.modes import dispatch',
        'trainer/modes/plan/table.py': '',
        'trainer/modes/dispatch.py': 'from trainer.modes.plan import table',
    }
    write_package(tmp_path, sources)
    assert cycles(graph(tmp_path)).keys() == {'trainer.modes.plan', 'trainer.modes.dispatch'}
    # A package may import its own modules, and these one another.
    sources['trainer/modes/plan/__init__.py'] = 'from .table import x'
    sources['trainer/modes/plan/table.py'] = 'from . import rows'
    sources['trainer/modes/plan/rows.py'] = ''
    write_package(tmp_path, sources)
    edges = graph(tmp_path)
    assert not cycles(edges) and not upwards(edges)
    assert edges['trainer.modes.plan.table'] == {'trainer.modes.plan.rows'}


def test_rooms_below_the_builders_do_not_read_the_config() -> None:
    edges = graph()
    sections = {f'trainer.config.{name}' for name in SECTIONS}
    for name in edges:
        if room_of(name) in BELOW_BUILD:
            found = reach(edges, name, room='config') & sections
            assert not found, (name, found)


def test_the_computation_imports_only_durations_and_errors_from_config() -> None:
    allowed = {'trainer.config', *FROM_CONFIG}
    for name, targets in graph().items():
        if room_of(name) in COMPUTATION:
            found = {target for target in targets if room_of(target) == 'config'} - allowed
            assert not found, (name, found)


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
