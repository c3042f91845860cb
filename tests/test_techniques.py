# SPDX-License-Identifier: Apache-2.0
"""The table of techniques: all names in it exist."""

from __future__ import annotations

import ast
import functools
import importlib
import re

import pytest
from flax import nnx

from tests import pages
from tests.command import ROOT
from trainer.config import schema
from trainer.modes import flags

ROWS = pages.table('guide', 'here', 'tests')
TESTS = sorted({name for *_, tests in ROWS for name in re.findall(r'`([^`]+)`', tests)})
NAMES = sorted({name for _, how, _ in ROWS for name in re.findall(r'`([^`]+)`', how)})

# What is neither a key of a config nor a name of ours: it stands in a user's own code.
_OTHERS = re.compile(
    r'model(\.[\w.]+)?(\(.*\))?|knn\.Module|flax\.(nnx|training\.checkpoints)'
    r'|setup|params|dtype|scan_layers|unroll|remat'
)


@pytest.mark.parametrize('name', TESTS)
def test_each_test_exists(name: str) -> None:
    """A file of tests, or a test in one."""
    file, _, function = name.partition('::')
    text = (ROOT / 'tests' / file).read_text()
    if function:
        assert function in _functions(text)


@pytest.mark.parametrize('name', NAMES)
def test_each_key_and_function_exists(name: str) -> None:
    if name.startswith('configs/'):
        assert (ROOT / name).is_file()
    elif name.startswith('--mode='):
        assert name.removeprefix('--mode=') in flags.MODES
    elif re.fullmatch(r'[\w.]+:\w+', name):
        module, attribute = name.split(':')
        assert hasattr(importlib.import_module(module), attribute)
    elif name.startswith('nnx.'):
        assert hasattr(nnx, name.removeprefix('nnx.'))
    elif not _OTHERS.fullmatch(name):
        keys = name.split('.')
        above = schema.section_at(keys[:-1])
        open_ended = above is not None and schema.takes_any_key(above)
        assert open_ended or schema.type_at(keys) is not None, f'{name} is no key of a config'


def test_every_guide_has_a_row() -> None:
    """Exactly one, by its title; the table has no row without a guide."""
    guides = [guide for guide, *_ in ROWS]
    assert len(guides) == len(set(guides))
    assert set(guides) == {*GUIDES, *OF_THE_API}


def test_every_row_has_its_tests() -> None:
    """Or a reason why there are none."""
    without = [guide for guide, _, tests in ROWS if '`' not in tests]
    assert not without
    told = [line for page in pages.PAGES.values() for line in page.sentences.splitlines()]
    reasons = '\n'.join(line for line in told if not line.startswith('|'))
    for name in ('imagenet', 'ppo', 'nlp_seq', 'sst2', 'wmt', 'ogbg_molpcba'):
        assert name in reasons, f'{name} has no config, and nobody says why'


def test_every_mode_is_in_the_table_of_modes() -> None:
    listed = [mode.strip('`') for mode, *_ in pages.table('--mode=')]
    assert set(listed) == set(flags.MODES)
    assert len(listed) % len(flags.MODES) == 0


# The titles of the pages of the documents, as they stand there and in their order. Without pages
# that show no technique: lists of other people's projects, the glossary, the philosophy, how to
# contribute, how to install, and how the documents are written.
GUIDES = (
    # The notebooks and guides of Flax 0.6.10.
    'JAX for the Impatient',
    'Quickstart',
    'Flax Basics',
    'Managing Parameters and State',
    'setup vs compact',
    'Dealing with Flax Module arguments',
    'Processing the entire Dataset',
    'Batch normalization',
    'Dropout',
    'Learning rate scheduling',
    'Transfer learning',
    'Save and load checkpoints',
    'Ensembling on multiple devices',
    'Scale up Flax Modules on multiple devices with pjit',
    'Model surgery',
    'Extracting intermediate values',
    'Extracting gradients of intermediate values',
    'Convert PyTorch models to Flax',
    'Migrate checkpointing to Orbax',
    'Upgrading my codebase to Optax',
    'Upgrading my codebase to Linen',
    '🔪 Flax - The Sharp Bits 🔪',
    # Its design notes, proposals (the first one has no title) and reference.
    'The Flax Module lifecycle',
    'Lifted transformations',
    'FLIP 1009: Optax',
    'FLIP: Default dtypes',
    'FLIP: Axis Metadata',
    'FLIP: kw_only dataclasses',
    'API Reference',
    # The page "Core examples": directories of the repository.
    'Core example: mnist',
    'Core example: imagenet',
    'Core example: ppo',
    'Core example: seq2seq',
    'Core example: nlp_seq',
    'Core example: sst2',
    'Core example: wmt',
    'Core example: lm1b',
    'Core example: vae',
    'Core example: ogbg_molpcba',
    # Klinen's one page, and the README of NNX 0.0.8 with its list of examples.
    'Klinen - Torch-like API for flax',
    'NNX: Neural Networks for JAX',
    'NNX: Using the Functional API',
    'NNX: Using Lifted Transforms',
    'NNX: Using TrainState',
    'NNX: Using PureModule',
    'NNX: Training a VAE',
    'NNX: Scan over layers',
    'NNX: Creating a Transformer',
)

# Techniques that have no page of their own there, only entries of the reference.
OF_THE_API = (
    'Recurrent networks',
    'Attention and decoding',
    'Data types',
    'Early stopping',
    'Dynamic loss scale',
    'Profiling',
    'Export',
)


@functools.cache
def _functions(text: str) -> frozenset[str]:
    return frozenset(n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef))
