# SPDX-License-Identifier: Apache-2.0
"""Measures of the source code that may only improve."""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator

import pytest

from tests.command import ROOT

PACKAGES = ('trainer', 'models', 'data', 'configs', 'launch')
LONGEST_FUNCTION_LINES = 60
# Place -> comments that switch the type checker off there. Lower a number when one goes.
TYPE_IGNORES = {
    'trainer': 3,
    'models': 0,
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
NAMED_PACKAGE = re.compile(r"needs the (packages? \w|extra ')")

# The modules of `trainer` that most of its files import, ties of the last of 20 included. Each has
# tests in a file of its own name, in the folder of its package.
CENTRAL = (
    'config/errors', 'compat', 'step/state', 'modules/model_view', 'config/durations',
    'tasks/runner', 'config/sections', 'parallel/mesh', 'tasks/metrics',
    'parallel/processes', 'experiment', 'config/objects', 'parallel/host', 'tasks/task',
    'modules/rng', 'modules/shapes', 'step/health', 'config/targets', 'modules/recorder',
    'parallel/signals', 'step/context', 'step/programs', 'config/schema', 'config/suggest',
)  # fmt: skip

# A function is named by a verb, or by the noun that it returns, not by one of these alone. `as_`,
# `to_`, `from_`, `with_` and `without_` begin the names of conversions.
PREPOSITIONS = frozenset({
    'above', 'after', 'alike', 'alone', 'anew', 'at', 'before', 'behind', 'below', 'beside',
    'between', 'by', 'down', 'here', 'in', 'inside', 'into', 'next', 'now', 'of', 'off', 'on',
    'once', 'only', 'out', 'over', 'per', 'since', 'than', 'then', 'there', 'under', 'until',
    'up', 'upon', 'within', 'what', 'when', 'where', 'which', 'how',
})  # fmt: skip
PARTICIPLES = frozenset({
    'bound', 'built', 'chosen', 'done', 'drawn', 'found', 'given', 'gone', 'held', 'hidden',
    'kept', 'known', 'laid', 'left', 'lost', 'made', 'meant', 'met', 'paid', 'said', 'seen',
    'sent', 'shown', 'spent', 'stood', 'taken', 'told', 'understood', 'written',
})  # fmt: skip
# Words that only look like participles.
VERBS_IN_ED = frozenset({'embed', 'feed', 'need', 'proceed', 'seed', 'shed', 'speed'})
# Names that configs, loaders of users and iterators have.
KEPT_NAMES = frozenset({'after', 'into', 'next'})

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
                if any(ast.unparse(each) == 'overload' for each in node.decorator_list):
                    continue  # The definition after the overloads has it.
                yield from () if ast.get_docstring(node) else (f'{path}:{node.lineno} {node.name}',)


@dataclasses.dataclass(frozen=True)
class Defined:
    """A function or method: where it is, its name, its lines, and its decorators."""

    place: str
    name: str
    lines: int
    decorators: tuple[str, ...]


@functools.cache
def functions(package: str) -> tuple[Defined, ...]:
    """Returns all functions and methods of a package; to parse it takes a second."""
    return tuple(
        Defined(
            place=f'{path}:{node.lineno}',
            name=node.name,
            lines=(node.end_lineno or 0) - node.lineno + 1,
            decorators=tuple(ast.unparse(each) for each in node.decorator_list),
        )
        for path, source in sources(package).items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, Function)
    )


@pytest.mark.parametrize('package', [*PACKAGES, 'tests'])
def test_no_function_is_longer_than_a_screen(package: str) -> None:
    long = [x for x in functions(package) if x.lines > LONGEST_FUNCTION_LINES]
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
    words = {each.rpartition('.')[2] for each in SKIPS}
    for path, source in sources('tests').items():
        if not any(word in source for word in words):
            continue
        for call in ast.walk(ast.parse(source)):
            if not isinstance(call, ast.Call) or getattr(call.func, 'attr', None) not in words:
                continue  # Most calls are others, and to unparse them all takes seconds.
            if ast.unparse(call.func) in SKIPS:
                texts = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
                assert any(NAMED_PACKAGE.match(str(text)) for text in texts), (
                    f'{path}:{call.lineno}'
                )


def is_no_name_of_a_function(name: str) -> bool:
    """Whether a name is a bare participle, or begins with a preposition or an adverb."""
    first, *rest = name.strip('_').split('_')
    if rest and rest[0]:
        return first in PREPOSITIONS - {'next'}  # `next_row` is a noun.
    looks_like_participle = first.endswith('ed') and first not in VERBS_IN_ED
    return first in PREPOSITIONS | PARTICIPLES or looks_like_participle


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('told', True), ('_in_order', True), ('_of_path', True), ('resolved', True),
        ('resolve', False), ('next_row', False), ('as_text', False), ('seed', False),
        ('hidden_fields', False),
    ],
)  # fmt: skip
def test_names_that_say_nothing(name: str, expected: bool) -> None:
    assert is_no_name_of_a_function(name) is expected


def test_functions_are_named_by_verbs_and_nouns() -> None:
    found = [
        function
        for package in (*PACKAGES, 'tests')
        for function in functions(package)
        if function.name.strip('_') not in KEPT_NAMES
        # A property is a value: its name may be an adjective.
        and not any('property' in each for each in function.decorators)
        and is_no_name_of_a_function(function.name)
    ]
    assert not found


@pytest.mark.parametrize('module', CENTRAL)
def test_central_modules_have_tests_of_their_name(module: str) -> None:
    path = pathlib.PurePosixPath(module)
    assert (ROOT / 'trainer' / f'{module}.py').is_file(), f'{module} has moved: change CENTRAL'
    tests = ROOT / 'tests' / path.parent / f'test_{path.name}.py'
    assert tests.is_file() and 'def test_' in tests.read_text(), tests
