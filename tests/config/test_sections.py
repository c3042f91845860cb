# SPDX-License-Identifier: Apache-2.0
"""The dataclasses of sections: every key has a type, a description and a valid default."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from trainer.config import schema, sections

SECTIONS = [
    value
    for value in vars(sections).values()
    if dataclasses.is_dataclass(value) and getattr(value, '__module__', '') == sections.__name__
]


def fields_with_defaults(section: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        default = schema.default_of(field)
        if not field.metadata.get('rest') and default is not schema.REQUIRED:
            yield field.name, default


@pytest.mark.parametrize('section', SECTIONS)
def test_attributes_are_described_in_their_order(section: Any) -> None:
    """`--helpconfig` and the reference print these lines."""
    _, _, listed = (section.__doc__ or '').partition('Attributes:\n')
    described = re.findall(r'^        (\w+):', listed, re.MULTILINE)
    named = [field.name for field in dataclasses.fields(section) if not field.metadata.get('rest')]
    assert [name for name in described if name in named] == named


@pytest.mark.parametrize('section', SECTIONS)
def test_defaults_have_the_types_of_their_keys(section: Any) -> None:
    for name, default in fields_with_defaults(section):
        is_made = dataclasses.is_dataclass(default) and not isinstance(default, sections.Duration)
        if is_made or name == 'vars':
            continue
        value = str(default) if isinstance(default, sections.Duration) else default
        assert schema.check(value, schema.fields(section)[name], name, {}) == default


@pytest.mark.parametrize('section', SECTIONS)
def test_sections_are_frozen_and_defaults_are_not_shared(section: Any) -> None:
    assert section.__dataclass_params__.frozen
    for field in dataclasses.fields(section):
        if field.default_factory is not dataclasses.MISSING:
            assert field.default_factory() is not field.default_factory()
