# SPDX-License-Identifier: Apache-2.0
"""Formats lists and tables for messages and reports."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

_MAX_LINES = 10


def and_more(items: Sequence[str], limit: int, separator: str = ', ') -> str:
    """Returns 'a, b, c', or 'a, b and 3 more' for more than `limit` items."""
    more = f' and {len(items) - limit} more' if len(items) > limit else ''
    return separator.join(items[:limit]) + more


def indented_list(items: Iterable[str], limit: int = _MAX_LINES) -> str:
    """Returns an indented line per item; beyond `limit`, a last line counts the others."""
    lines = [f'  {item}' for item in items]
    more = [f'  and {len(lines) - limit} more'] if len(lines) > limit else []
    return '\n'.join([*lines[:limit], *more])


def align_columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Returns the lines of a table with aligned columns.

    Args:
        rows: the cells of each row, the header first; all rows have the same number of cells.
        right: indices of the right-aligned columns, such as those of numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        # An empty last cell would leave trailing spaces, which show up in diffs of saved output.
        lines.append('  '.join(cells).rstrip())
    return lines
