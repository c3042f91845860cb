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
