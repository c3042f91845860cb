# SPDX-License-Identifier: Apache-2.0
"""Lists and tables in messages."""

from __future__ import annotations

from trainer.config.text import aligned, and_more, listed


def test_long_lists_say_how_many_more_there_are() -> None:
    assert and_more(['a', 'b'], 2) == 'a, b'
    assert and_more(['a', 'b', 'c', 'd'], 2, '; ') == 'a; b and 2 more'
    assert listed(iter('abc'), 3) == '  a\n  b\n  c'
    assert listed('abcde', 3) == '  a\n  b\n  c\n  and 2 more'
    assert listed([]) == ''


def test_cells_of_a_column_are_below_each_other() -> None:
    rows = [('name', 'size', 'kind'), ('a', '1,000', ''), ('longer', '2', 'x')]
    assert aligned(rows, right=[1]) == ['name     size  kind', 'a       1,000', 'longer      2  x']
    assert aligned([('a', 'b')]) == ['a  b']
