# SPDX-License-Identifier: Apache-2.0
"""Folds repeated blocks of a table: one `block_0..23/attention` in place of 24 equal lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

# Two equal layers are shown as they are: a reader sees at once that they are alike.
_FEWEST = 3

# A path taken apart, and the number of the entry that has it.
_Entry = tuple[tuple[str, ...], int]


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        path: path of the entry, or of all that are folded: 'block_0..23/attention/kernel'.
        entry: index of the first entry on this line.
        count: number of entries on this line.
    """

    path: str
    entry: int
    count: int


def fold(paths: Sequence[str], contents: Sequence[Hashable]) -> list[Line]:
    """Returns the lines of a table, in the order of the entries.

    Blocks are folded if their names differ in a last number alone, the numbers are consecutive, and
    everything inside is equal.

    Args:
        paths: paths of the entries, with '/' between names.
        contents: for each entry, whatever must be equal in all blocks.
    """
    entries = [(tuple(path.split('/')), index) for index, path in enumerate(paths)]
    return _fold(entries, contents, '', 1)


def text(count: int, number: float) -> str:
    """Returns '24 x 65,536' for a number that is the same in 24 entries, '65,536' for one."""
    return f'{count} x {number:,.0f}' if count > 1 else f'{number:,.0f}'


def _fold(
    entries: Sequence[_Entry], contents: Sequence[Hashable], prefix: str, count: int
) -> list[Line]:
    blocks: dict[str, list[_Entry]] = {}
    for (name, *rest), index in entries:
        blocks.setdefault(name, []).append((tuple(rest), index))
    # What a block contains is compared whole, at all depths: its paths and their contents, without
    # its own name.
    equal = {
        name: tuple((rest, contents[index]) for rest, index in block)
        for name, block in blocks.items()
    }
    lines: list[Line] = []
    done: set[str] = set()
    for name in blocks:
        if name in done:
            continue
        # Folding goes from the outside in: a block that is folded once is shown once, with its own
        # inner blocks folded in turn.
        group = _equal_neighbors(name, equal)
        done.update(group)
        title = name if len(group) == 1 else f'{group[0]}..{_number(group[-1])}'
        block, path, copies = blocks[group[0]], f'{prefix}{title}', count * len(group)
        lines += [Line(path, index, copies) for rest, index in block if not rest]
        inner = [(rest, index) for rest, index in block if rest]
        lines += _fold(inner, contents, f'{path}/', copies) if inner else []
    return lines


def _equal_neighbors(name: str, contents: Mapping[str, Hashable]) -> list[str]:
    """Returns the names around a numbered one with equal contents, if they are enough to fold."""
    if not (digits := _number(name)):
        return [name]
    stem, group = name.removesuffix(digits), [name]
    # Paths are often in the order of their text, in which 10 comes before 2.
    for step in (-1, 1):
        number = int(digits) + step
        while contents.get(neighbor := f'{stem}{number}') == contents[name]:
            group.insert(0 if step < 0 else len(group), neighbor)
            number += step
    return group if len(group) >= _FEWEST else [name]


def _number(name: str) -> str:
    """Returns the number that ends a name, '' if there is none or if it is written like '007'."""
    digits = name[len(name.rstrip('0123456789')) :]
    return digits if digits == '0' or digits[:1] != '0' else ''
