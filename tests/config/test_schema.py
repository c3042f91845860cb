# SPDX-License-Identifier: Apache-2.0
"""A plain config becomes sections; types and defaults of key paths."""

from __future__ import annotations

import re
from typing import Any

import pytest

from trainer.config import schema
from trainer.config.durations import Duration
from trainer.config.errors import UserError
from trainer.config.sections import CheckpointSection, EmaSection, Sections


def plain(**changes: Any) -> dict[str, Any]:
    node = {'target': 'package.module:Name'}
    required = {'train_for': '3 epochs', 'model': node, 'task': node, 'optimizer': node}
    return {**required, 'data': {'source': node, 'batch_size': 32}, **changes}


def test_values_get_the_types_of_their_keys() -> None:
    read = schema.read(plain(ema={'decay': 0.5}, early_stopping=None, init_from={'path': 'a'}))
    assert read.train_for == Duration.parse('3 epochs')
    assert read.ema is not None and (read.ema.decay, read.early_stopping) == (0.5, None)
    assert read.checkpoint == CheckpointSection()
    assert read.optimizer.node == {'target': 'package.module:Name'}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'sead': 1}, 'Unknown key config.sead. Did you mean config.seed?'),
        ({'data': {'source': {'target': 'a:b'}}}, 'config.data.batch_size is missing; it has no'),
        ({'seed': True}, 'config.seed: expected int, got True'),
        ({'seed': 2**63}, 'does not fit 64 bits'),
        ({'seed': schema.REQUIRED}, 'config.seed is required but has no value; set it: --config.'),
        ({'ema': 0.9}, 'Did you mean config.ema.decay=0.9?'),
        ({'init_from': 'runs/1'}, 'Did you mean config.init_from.path=runs/1?'),
        ({'model': 'a.b:C'}, '"ref" in place of "target"'),
        ({'guard': {'non_finite': 'halt'}}, "'halt' is none of "),
        ({'mesh': {1: 2}}, 'config.mesh: expected names as keys, got 1'),
    ],
)
def test_mistakes_name_the_key_and_what_was_expected(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        schema.read(plain(**changes))


def test_an_incomplete_config_keeps_its_placeholders() -> None:
    read = schema.read(plain(seed=schema.REQUIRED), complete=False)
    assert repr(read.seed) == '(required)'


@pytest.mark.parametrize(
    ('keys', 'expected'),
    [
        (('seed',), int),
        (('checkpoint', 'every'), Duration),
        (('ema', 'decay'), float),
        (('evals', 'any_name', 'every'), Duration),
        (('model', 'features'), None),
        (('sead',), None),
        (('ensemble', 'vary', 'seed', 'x'), object),
    ],
)
def test_types_of_paths(keys: tuple[str, ...], expected: Any) -> None:
    assert schema.type_at(keys) is expected


def test_sections_of_paths() -> None:
    assert schema.section_at(()) is Sections
    assert schema.section_at(('ema',)) is EmaSection
    assert schema.section_at(('seed',)) is None
    assert schema.takes_any_key(type(schema.read(plain()).optimizer))
    assert not schema.takes_any_key(EmaSection)


def test_defaults_are_those_of_keys_that_are_not_set() -> None:
    found = {path: default for path, _, default in schema.defaults(plain(seed=3))}
    assert 'seed' not in found and 'train_for' not in found
    assert (found['ema'], found['data.shuffle'], found['accumulate']) == (None, True, 1)
    assert 'checkpoint' not in found and 'checkpoint.every' in found
    optional = {path: default for path, _, default in schema.optional_fields(plain())}
    assert optional['early_stopping.metric'] is schema.REQUIRED
    assert schema.default_object(['mesh']) == {'data': -1}
    assert schema.default_object(['seed']) == {}


@pytest.mark.parametrize(
    ('hint', 'text'),
    [
        (int | None, 'int or None'),
        (tuple[str, ...], 'tuple[str, ...]'),
        (Duration, 'duration'),
        (EmaSection | None, 'section or None'),
        (dict[str, Any], 'object'),
    ],
)
def test_names_of_types(hint: Any, text: str) -> None:
    assert schema.describe(hint) == text
