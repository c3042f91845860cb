# SPDX-License-Identifier: Apache-2.0
"""Lists and tables in messages and on the screen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

_MOST_LINES = 10


def and_more(items: Sequence[str], limit: int, separator: str = ', ') -> str:
    """Returns 'a, b, c', and beyond `limit` items 'a, b and 3 more'."""
    more = f' and {len(items) - limit} more' if len(items) > limit else ''
    return separator.join(items[:limit]) + more


def indented_list(items: Iterable[str], limit: int = _MOST_LINES) -> str:
    """Returns a line for each item, indented, and beyond `limit` one that says how many more."""
    lines = [f'  {item}' for item in items]
    more = [f'  and {len(lines) - limit} more'] if len(lines) > limit else []
    return '\n'.join([*lines[:limit], *more])


def align_columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Returns a line for each row, with the cells of a column below each other.

    Args:
        rows: of equal length, the header first.
        right: numbers of the columns that end below each other, such as those of numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append('  '.join(cells).rstrip())
    return lines
