# SPDX-License-Identifier: Apache-2.0
"""Aligns the columns of tables for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def align_columns(
    rows: Sequence[Sequence[str]], right: Collection[int] = (), widest: Sequence[int] = ()
) -> list[str]:
    """Returns the lines of a table with aligned columns.

    Args:
        rows: the cells of each row, the header first; all rows have the same number of cells.
        right: indices of the right-aligned columns, such as those of numbers.
        widest: the largest width of the first columns; a cell that is wider shifts the rest of its
            row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[: len(widest)] = map(min, widths, widest)
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        # An empty last cell would leave trailing spaces, which show up in diffs of saved output.
        lines.append('  '.join(cells).rstrip())
    return lines
