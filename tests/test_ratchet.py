# SPDX-License-Identifier: Apache-2.0
"""Measures of the source code that may only improve."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.command import ROOT

PACKAGES = ('trainer', 'models', 'data', 'configs', 'launch')
LONGEST_FUNCTION_LINES = 60
# Place -> comments that switch the type checker off there. Lower a number when one goes.
TYPE_IGNORES = {
    'trainer/klinen': 9,
    'trainer': 6,
    'models': 1,
    'data': 0,
    'configs': 0,
    'launch': 0,
}
MOST_NOQA = 4
SKIPS = (
    'pytest.skip',
    'pytest.mark.skip',
    'pytest.mark.skipif',
    'pytest.xfail',
    'pytest.mark.xfail',
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*packages: str) -> dict[str, str]:
    """Returns the text of each file, by its path."""
    paths = [path for package in packages for path in sorted((ROOT / package).rglob('*.py'))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def find_undocumented(path: str, tree: ast.Module) -> Iterator[str]:
    """Yields the public classes, functions and methods without a docstring."""
    public = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != '_']
    for owner in (tree, *public):
        for node in owner.body:
            if isinstance(node, Function | ast.ClassDef) and node.name[0] != '_':
                yield from () if ast.get_docstring(node) else (f'{path}:{node.lineno} {node.name}',)


@pytest.mark.parametrize('package', [*PACKAGES, 'tests'])
def test_no_function_is_longer_than_a_screen(package: str) -> None:
    long = []
    for path, source in sources(package).items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, Function):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST_FUNCTION_LINES:
                    long.append(f'{path}:{node.lineno} {node.name}: {lines} lines')
    assert not long


def test_what_is_public_has_a_docstring() -> None:
    bare = [
        name
        for path, source in sources(*PACKAGES).items()
        for name in find_undocumented(path, ast.parse(source))
    ]
    assert not bare


def test_the_number_of_type_ignores_does_not_grow() -> None:
    found = dict.fromkeys(TYPE_IGNORES, 0)
    for path, source in sources(*PACKAGES).items():
        place = next(place for place in TYPE_IGNORES if path.startswith(f'{place}/'))
        found[place] += len(re.findall(r'#\s*type: ignore', source))
    assert all(found[place] <= most for place, most in TYPE_IGNORES.items()), found


def test_the_number_of_lint_exceptions_does_not_grow() -> None:
    found = {path: source.count('# noqa') for path, source in sources(*PACKAGES).items()}
    assert sum(found.values()) <= MOST_NOQA, {path: n for path, n in found.items() if n}


def test_tests_are_skipped_only_for_missing_packages() -> None:
    """And name them, as `pytest.importorskip` does."""
    for path, source in sources('tests').items():
        for call in ast.walk(ast.parse(source)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in SKIPS:
                texts = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
                says = any(isinstance(text, str) and text.startswith('needs ') for text in texts)
                assert says, f'{path}:{call.lineno}'
