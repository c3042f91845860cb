# SPDX-License-Identifier: Apache-2.0
"""The README's table of techniques: all that it names exists."""

from __future__ import annotations

import ast
import functools
import importlib
import re

import pytest

from tests.command import ROOT
from trainer import main
from trainer.config import schema

_PAGE = (ROOT / 'README.md').read_text().split('## Technique by technique')[1].split('\n## ')[0]
ROWS = [
    tuple(cell.strip() for cell in line.strip('|').split('|'))
    for line in _PAGE.splitlines()
    if line.startswith('| ') and not line.startswith(('| guide', '|---'))
]
TESTS = sorted({name for *_, tests in ROWS for name in re.findall(r'`([^`]+)`', tests)})
NAMES = sorted({name for _, how, _ in ROWS for name in re.findall(r'`([^`]+)`', how)})

# What is neither a key of a config nor a name of ours: it stands in a user's own code.
_OTHERS = re.compile(
    r'model(\.[\w.]+)?(\(.*\))?|knn\.Module|flax\.(nnx|training\.checkpoints)'
    r'|setup|params|scan_layers|unroll|remat'
)


@pytest.mark.parametrize('name', TESTS)
def test_each_test_is_there(name: str) -> None:
    """Either a file of tests, or one of its tests."""
    file, _, function = name.partition('::')
    text = (ROOT / 'tests' / file).read_text()
    if function:
        assert function in _functions(text)


@pytest.mark.parametrize('name', NAMES)
def test_each_key_and_function_is_there(name: str) -> None:
    if name.startswith('configs/'):
        assert (ROOT / name).is_file()
    elif name.startswith('--mode='):
        assert name.removeprefix('--mode=') in main.MODES
    elif re.fullmatch(r'[\w.]+:\w+', name):
        module, attribute = name.split(':')
        assert hasattr(importlib.import_module(module), attribute)
    elif not _OTHERS.fullmatch(name):
        keys = name.split('.')
        above = schema.section_at(keys[:-1])
        open_ended = above is not None and schema.takes_any_key(above)
        assert open_ended or schema.type_at(keys) is not None, f'{name} is no key of a config'


def test_every_guide_has_a_row() -> None:
    """Of the documentation of Flax, by its title."""
    guides = {guide for guide, *_ in ROWS}
    assert guides >= set(GUIDES), set(GUIDES) - guides


GUIDES = (
    'Quickstart',
    'Flax Basics',
    'Managing parameters and state',
    'setup or compact',
    'Dealing with flag arguments',
    'Processing the entire dataset',
    'Batch normalization',
    'Dropout',
    'Learning rate scheduling',
    'Transfer learning',
    'Save and load checkpoints',
    'Ensembling on multiple devices',
    'Scale up on multiple devices',
    'Model surgery',
    'Extracting intermediate values',
    'Extracting gradients of intermediate values',
    'Convert PyTorch models',
    'Migrate checkpointing to Orbax',
    'Upgrading to Optax',
    'Upgrading to Linen',
    'Lifted transformations',
    'The module lifecycle',
    'Recurrent networks',
    'Attention and decoding',
    'Data types',
    'Early stopping',
    'Dynamic loss scale',
    'Profiling',
    'Export',
    'Klinen',
    'NNX',
)


@functools.cache
def _functions(text: str) -> frozenset[str]:
    return frozenset(n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef))
