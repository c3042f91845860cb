# SPDX-License-Identifier: Apache-2.0
"""Repeated blocks of a table are one line."""

from __future__ import annotations

import pytest

from trainer.observe import repeats


def fold_entries(*entries: str) -> list[str]:
    """Returns the lines of entries such as 'block_0/kernel=8x8'."""
    paths, contents = zip(*(entry.split('=') for entry in entries), strict=True)
    lines = repeats.fold(paths, contents)
    assert sum(line.count for line in lines) == len(entries)
    return [f'{line.path}={repeats.text(line.count, 7)}' for line in lines]


def test_equal_blocks_share_a_line() -> None:
    blocks = [f'block_{i}/{x}' for i in range(24) for x in ('bias=8', 'kernel=8x8')]
    assert fold_entries('embed=a', *sorted(blocks), 'head=b') == [
        'embed=7',
        'block_0..23/bias=24 x 7',
        'block_0..23/kernel=24 x 7',
        'head=7',
    ]


def test_a_block_that_differs_ends_a_range() -> None:
    blocks = [f'block_{i}=x' for i in range(14)]
    blocks[0] = 'block_0=first'
    blocks[5] = 'block_5=y'
    # In the order of the entries, in which block_10 comes before block_2.
    assert fold_entries(*sorted(blocks)) == [
        'block_0=7',
        'block_6..13=8 x 7',
        'block_1..4=4 x 7',
        'block_5=7',
    ]


def test_nested_blocks() -> None:
    entries = [f'stage_{i}/conv_{j}/kernel=k' for i in range(3) for j in range(4)]
    assert fold_entries(*entries) == ['stage_0..2/conv_0..3/kernel=12 x 7']


def test_a_block_and_its_parts() -> None:
    entries = [f'layers/{i}{x}' for i in range(3) for x in ('=Block', '/mlp=MLP')]
    assert fold_entries('layers=List', *entries) == [
        'layers=7',
        'layers/0..2=3 x 7',
        'layers/0..2/mlp=3 x 7',
    ]


@pytest.mark.parametrize(
    'entries',
    [
        ('dense_0=a', 'dense_1=a'),
        ('dense_0=a', 'dense_2=a', 'dense_4=a'),
        ('dense_1=a', 'dense_02=a', 'dense_3=a'),
        ('a=x', 'b=x', 'c=x'),
        ('x0/a=1', 'x1/b=1', 'x2/c=1'),
    ],
)
def test_other_entries_keep_their_lines(entries: tuple[str, ...]) -> None:
    assert fold_entries(*entries) == [f'{entry.split("=")[0]}=7' for entry in entries]
