# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of a config, and messages for those that match nothing."""

from __future__ import annotations

import pytest

from trainer.config.errors import UserError
from trainer.modules import patterns

PATHS = [f'layer_{i}/kernel' for i in range(7)]


def test_a_pattern_must_match_a_whole_path() -> None:
    assert patterns.matches(['nothing', 'layer_3/.*'], 'layer_3/kernel')
    assert not patterns.matches(['layer_3', 'kernel'], 'layer_3/kernel')
    assert not patterns.matches([], 'layer_3/kernel')


def test_an_invalid_pattern_names_its_key_path() -> None:
    assert patterns.compile_pattern('a+', 'config.x').fullmatch('aaa')
    with pytest.raises(UserError, match=r"^config\.x: 'a\(' is not a regular expression: missing"):
        patterns.compile_pattern('a(', 'config.x')


def test_a_pattern_without_a_match_lists_the_paths() -> None:
    patterns.check_used(['layer_0/.*', '.*'], PATHS, 'config.x')
    with pytest.raises(UserError) as caught:
        patterns.check_used(['.*', 'layer'], PATHS, 'config.x')
    assert str(caught.value) == (
        "config.x: the pattern 'layer' matches no parameter. A pattern must match a whole path, "
        'such as layer_0/kernel, layer_1/kernel, layer_2/kernel, layer_3/kernel, layer_4/kernel '
        'and 2 more'
    )
    with pytest.raises(UserError, match=r"'a' matches nothing in the model: there is none$"):
        patterns.check_used(['a'], [], 'config.x', 'nothing in the model')


def test_of_several_patterns_one_may_have_to_match() -> None:
    patterns.check_used(['nothing', 'layer_0/.*'], PATHS, 'config.x', each=False)
    patterns.check_used([], PATHS, 'config.x', each=False)
    with pytest.raises(UserError, match=r"^config\.x: 'a', 'b' match no parameter\. A pattern "):
        patterns.check_used(['a', 'b'], PATHS, 'config.x', each=False)


def test_patterns_for_parts_of_paths_are_not_told_to_match_whole_ones() -> None:
    error = patterns.no_match_error('config.x', ['a'], PATHS[:2], 'no array', is_whole=False)
    assert str(error) == (
        "config.x: the pattern 'a' matches no array. The paths are layer_0/kernel, layer_1/kernel"
    )
