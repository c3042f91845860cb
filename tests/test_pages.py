# SPDX-License-Identifier: Apache-2.0
"""Links, paths and modules on the pages exist."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import unicodedata
from collections.abc import Iterator

import pytest

import trainer
from tests import pages
from tests.command import ROOT
from tests.pages import PAGES, Page
from trainer.trainer import Trainer

# The folders of the checkout whose files pages name.
_FOLDERS = ('configs', 'data', 'docs', 'launch', 'models', 'tests', 'trainer')
_PATH = re.compile(rf'((?:{"|".join(_FOLDERS)})/[\w./*-]*)(?:::\w+)?')
_KINDS = {'', 'bash', 'json', 'py', 'python', 'sh', 'text', 'toml', 'yaml'}


def _code(page: Page) -> list[str]:
    return re.findall(r'`([^`]+)`', page.sentences)


def _anchors(page: Page) -> set[str]:
    """Returns the anchors of the page's headings, on the site and in a repository."""
    found = set()
    for title in re.findall(r'^#+ (.+?)(?: \{.*\})?$', page.sentences, flags=re.MULTILINE):
        plain = re.sub(r'\[([^\]]*)\]\([^)]*\)|[`*]', r'\1', title)
        ascii_text = unicodedata.normalize('NFKD', plain).encode('ascii', 'ignore').decode()
        text = re.sub(r'[^\w\s-]', '', ascii_text).strip().lower()
        found |= {re.sub(r'[-\s]+', '-', text), text.replace(' ', '-')}
    return found | set(re.findall(r'\{ *#([\w.-]+)', page.sentences))


@pytest.mark.parametrize('name', PAGES)
def test_link_targets_exist(name: str) -> None:
    page = PAGES[name]
    text = re.sub(r'`[^`]*`', '', page.sentences)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'https?:|mailto:', target):
            continue
        path, _, anchor = target.partition('#')
        found = (page.path.parent / path).resolve() if path else page.path
        assert found.exists(), f'{target}: no such file'
        if name.startswith('docs/'):
            assert found.is_relative_to(ROOT / 'docs'), f'{target}: not a page of the site'
        if anchor and not name.startswith('docs/reference/'):
            other = PAGES[found.relative_to(ROOT).as_posix().removesuffix('.md')]
            anchors = _anchors(other)
            assert anchor in anchors or '::: ' in other.text, f'{target}: none of {anchors}'


@pytest.mark.parametrize('name', PAGES)
def test_paths_exist(name: str) -> None:
    for code in _code(PAGES[name]):
        if match := _PATH.fullmatch(code):
            path = match[1].rstrip('/')
            # The table of techniques names tests from below `tests/`.
            found = [*ROOT.glob(path), *(ROOT / 'tests').glob(path)]
            assert found, f'`{code}`: no such path'


@pytest.mark.parametrize('name', PAGES)
def test_modules_exist(name: str) -> None:
    """`trainer.schedules:rsqrt` and `trainer.hooks`; `trainer.fit` is of an instance."""
    for code in _code(PAGES[name]):
        if not (match := re.match(r'trainer((?:\.\w+)*)(?::(\w+))?(?![\w/])', code)):
            continue
        dotted, attribute = match[1].strip('.').split('.'), match[2]
        if not match[1] or dotted == ['py'] or hasattr(Trainer, dotted[0]):
            continue
        owner, rest = trainer, dotted
        while rest and not attribute and hasattr(owner, rest[0]):
            owner, rest = getattr(owner, rest[0]), rest[1:]
        if rest:
            owner = _module(code, dotted)
        assert attribute is None or hasattr(owner, attribute), f'`{code}`: no {attribute}'


def _module(code: str, dotted: list[str]) -> object:
    """Returns the object of a dotted name after `trainer.`: a module, or an attribute of one."""
    for end in range(len(dotted), 0, -1):
        try:
            found: object = importlib.import_module('.'.join(('trainer', *dotted[:end])))
        except ModuleNotFoundError:
            continue
        for attribute in dotted[end:]:
            assert hasattr(found, attribute), f'`{code}`: no {attribute}'
            found = getattr(found, attribute)
        return found
    raise AssertionError(f'`{code}`: no such module')


@functools.cache
def _members() -> dict[str, set[str]]:
    """Returns the names defined in each class of the packages and in its bases, by class name.

    Those of classes of one name are united.
    """
    found: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for folder in ('trainer', 'models', 'data'):
        for path in (ROOT / folder).rglob('*.py'):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, set()).update(_names(node))
                    names = {ast.unparse(base).rpartition('.')[2] for base in node.bases}
                    bases.setdefault(node.name, set()).update(names)

    def with_bases(name: str, above: frozenset[str]) -> set[str]:
        # A class may have the name of its base: `class Metric(clu.metrics.Metric)`.
        inherited = (
            with_bases(base, above | {name}) for base in bases[name] & found.keys() - above
        )
        return found[name].union(*inherited)

    return {name: with_bases(name, frozenset({name})) for name in found}


def _names(owner: ast.ClassDef) -> Iterator[str]:
    """Yields the methods and the attributes of a class, also those that methods assign."""
    for node in ast.walk(owner):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


# The other pages name classes of other frameworks, too.
_OWN_CLASSES = [name for name in PAGES if not name.startswith('docs/coming_from/')]


@pytest.mark.parametrize('name', _OWN_CLASSES)
def test_methods_exist(name: str) -> None:
    """`Recovery.start`, and `Trainer.model()`."""
    for code in _code(PAGES[name]):
        match = re.match(r'([A-Z]\w+)\.(\w+)(?:\(|$)', code)
        if match and match[1] in _members():
            assert match[2] in _members()[match[1]], f'`{code}`: no {match[2]}'


def test_the_walk_through_the_code_names_methods() -> None:
    walk = [re.match(r'([A-Z]\w+)\.\w+$', code) for code in _code(PAGES['docs/internals'])]
    assert {match[1] for match in walk if match} >= {'Trainer', 'Recovery', 'Evaluator'}
    assert {match[1] for match in walk if match} <= set(_members())


@pytest.mark.parametrize('name', [name for name in PAGES if name.startswith('docs/')])
def test_the_site_reads_it_as_a_repository_does(name: str) -> None:
    """Python-Markdown needs a blank line above lists and tables, and four spaces to nest.

    A list also needs a blank line after a paragraph that is nested in it.
    """
    above, in_nested = '', False
    for line in PAGES[name].sentences.splitlines():
        if not above.strip():
            in_nested = bool(re.match(r' {4}(?! *([-*]|\d+\.) )', line))
        assert not (in_nested and re.match(r'([-*]|\d+\.) ', line)), f'no blank line above: {line}'
        nested = re.match(r'( +)([-*]|\d+\.) ', line)
        assert not nested or len(nested[1]) % 4 == 0, f'nest lists by four spaces: {line}'
        for start in (r' *([-*]|1\.) ', r'\|'):
            if re.match(start, line) and above.strip() and not above.startswith((' ', '<!--')):
                assert re.match(r' *([-*]|\d+\.) |\|', above), f'no blank line above: {line}'
        above = line


def test_names_of_files_are_unique() -> None:
    """All pages share one project."""
    named = [
        match[1]
        for block in pages.BLOCKS
        if block.kind == 'python' and (match := re.match(r'# ([\w/]+\.py)\n', block.text))
    ]
    assert sorted(named) == sorted(set(named))
    assert set(named) == set(pages.FILES)


def test_every_block_is_of_a_known_kind() -> None:
    """The kind determines how a block is tested: one of an unknown kind is not tested."""
    for block in pages.BLOCKS:
        where = f'{block.page}:{block.line}'
        assert block.kind in _KINDS, f'{where}: {block.kind}'
        if block.kind == '':
            assert not re.match(r'(python|launch/|import |from |c\.|config\.)', block.text), where
        if block.kind == 'py':
            assert block.page.startswith('docs/coming_from/'), where
            ast.parse(block.text)


def test_every_page_is_read() -> None:
    """Each fence of each page is a block, and those that show code have blocks."""
    for page in PAGES.values():
        fences = [line for line in page.text.splitlines() if re.match(r' *```', line)]
        assert len(fences) == 2 * len(page.blocks), page.name
    with_blocks = {block.page for block in pages.BLOCKS}
    assert {'README', 'launch/README'} <= with_blocks
    for kinds in (('python',), ('bash', 'sh'), ('text',)):
        assert [block for block in pages.BLOCKS if block.kind in kinds], kinds
    names = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'docs').rglob('*.md')}
    assert names == {f'{name}.md' for name in PAGES if name.startswith('docs/')}


def test_the_index_of_the_api_lists_its_pages() -> None:
    index = PAGES['docs/reference/api/index']
    pages_of_api = {path.name for path in index.path.parent.glob('*.md')} - {'index.md'}
    assert set(re.findall(r'\]\((\w+\.md)\)', index.text)) == pages_of_api
