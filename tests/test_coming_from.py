# SPDX-License-Identifier: Apache-2.0
"""The tables for users of other frameworks: each key, mode and name in the column "here" exists."""

from __future__ import annotations

import importlib
import re

import pytest

from tests import pages
from trainer.config import schema
from trainer.config.sections import Node, Sections
from trainer.modes import flags

_HERE = [row[1] for other in ('Lightning', 'Keras') for row in pages.table(other, 'here')]
CODE = sorted({code for cell in _HERE for code in re.findall(r'`([^`]+)`', cell)})
SECTIONS = schema.fields(Sections)


def _like_keys() -> list[list[str]]:
    """Returns texts that begin like a config key: 'evals.NAME.every', "sharding='fsdp'"."""
    found = [re.match(r'([a-z_]+(?:\.\w+)*)(?: ?=|$)', code) for code in CODE]
    return [match[1].split('.') for match in found if match]


# What else a name with dots begins with: objects, files, libraries.
_FIRST = (
    'jax',
    'contextlib',
    'state',
    'event',
    'config',
    'metrics',
    'variables',
    'clu',
    'from_model_output',
)
KEYS = [
    keys
    for keys in _like_keys()
    if keys[0] not in _FIRST and (len(keys) > 1 or keys[0] in SECTIONS)
]


@pytest.mark.parametrize('keys', KEYS, ids='.'.join)
def test_each_key_is_there(keys: list[str]) -> None:
    above = schema.section_at(keys[:-1])
    # The arguments of a source or a task are checked where they are built.
    inside = any(schema.type_at(keys[:end]) == Node for end in range(1, len(keys)))
    open_ended = above is not None and schema.takes_any_key(above)
    assert inside or open_ended or schema.type_at(keys) is not None


@pytest.mark.parametrize('code', [code for code in CODE if re.fullmatch(r'[\w.]+:\w+', code)])
def test_each_name_is_there(code: str) -> None:
    module, name = code.split(':')
    assert hasattr(importlib.import_module(module), name)


def test_each_mode_is_there() -> None:
    modes = {match[1] for code in CODE if (match := re.match(r'--mode=(\w+)', code))}
    assert len(modes) > 3
    assert modes <= set(flags.MODES)
