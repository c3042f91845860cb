# SPDX-License-Identifier: Apache-2.0
"""Tables of the terminal."""

from __future__ import annotations

from trainer.config.columns import align_columns


def test_columns_are_aligned() -> None:
    rows = [('name', 'size', 'kind'), ('a', '1,000', ''), ('longer', '2', 'x')]
    assert align_columns(rows, right=[1]) == [
        'name     size  kind',
        'a       1,000',
        'longer      2  x',
    ]
    assert align_columns([('a', 'b')]) == ['a  b']


def test_a_cell_above_the_largest_width_shifts_its_own_row_only() -> None:
    rows = [('a', 'x'), ('much longer', 'y'), ('b', 'z')]
    assert align_columns(rows, widest=(3,)) == ['a    x', 'much longer  y', 'b    z']
    # No wider than the cells need.
    assert align_columns([('a', 'x')], widest=(9, 9)) == ['a  x']
