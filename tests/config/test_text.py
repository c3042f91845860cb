# SPDX-License-Identifier: Apache-2.0
"""Lists and tables in messages."""

from __future__ import annotations

from trainer.config.text import align_columns, and_more, indented_list


def test_long_lists_count_the_remaining_items() -> None:
    assert and_more(['a', 'b'], 2) == 'a, b'
    assert and_more(['a', 'b', 'c', 'd'], 2, '; ') == 'a; b and 2 more'
    assert indented_list(iter('abc'), 3) == '  a\n  b\n  c'
    assert indented_list('abcde', 3) == '  a\n  b\n  c\n  and 2 more'
    assert indented_list([]) == ''


def test_columns_are_aligned() -> None:
    rows = [('name', 'size', 'kind'), ('a', '1,000', ''), ('longer', '2', 'x')]
    assert align_columns(rows, right=[1]) == [
        'name     size  kind',
        'a       1,000',
        'longer      2  x',
    ]
    assert align_columns([('a', 'b')]) == ['a  b']
