# SPDX-License-Identifier: Apache-2.0
"""Reads molecules from SDF files with tables of atoms and bonds (V2000), without a package."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .molecules import Graph

# Charges as a table of atoms has them; 4 is a radical.
_CHARGES = {1: 3, 2: 2, 3: 1, 5: -1, 6: -2, 7: -3}

# Values of the features; each is stored as the index of its value. The last element is any other.
# The valence is the sum over the bonds of an atom, of which a double bond counts as two.
ATOM_FEATURES: Mapping[str, tuple[Any, ...]] = {
    'element': ('C', 'N', 'O', 'S', 'F', 'Cl', 'Br', 'I', 'P', 'B', 'Si', 'other'),
    'degree': (0, 1, 2, 3, 4, 5, 6),
    'charge': (-2, -1, 0, 1, 2),
    'valence': (0, 1, 2, 3, 4, 5, 6),
}
BOND_FEATURES: Mapping[str, tuple[Any, ...]] = {'order': (1, 2, 3, 4)}
# Number of values of each feature, for embeddings.
ATOM_SIZES = tuple(len(values) for values in ATOM_FEATURES.values())
BOND_SIZES = tuple(len(values) for values in BOND_FEATURES.values())


class Record(NamedTuple):
    """A molecule of a file.

    Attributes:
        graph: its atoms and bonds, with the features of this module.
        fields: its data fields, by name.
    """

    graph: Graph
    fields: dict[str, str]


def parse(text: str) -> list[Record]:
    """Returns the molecules of a file, without the positions of their atoms.

    The format is that of Dalby et al. 1992, https://doi.org/10.1021/ci00007a012. Opposite charges
    of two atoms with a bond are written as one more bond, as some programs have them: a nitro group
    has two double bonds.

    Raises:
        ValueError: naming the first molecule that cannot be read.
    """
    records = []
    for number, lines in enumerate(_split(text.splitlines()), 1):
        try:
            records.append(Record(_parse_graph(lines), _parse_fields(lines)))
        except (ValueError, IndexError) as error:
            raise ValueError(f'molecule {number} of the file cannot be read: {error}') from error
    return records


def _split(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yields the lines of each molecule."""
    found: list[str] = []
    for line in lines:
        if line.startswith('$$$$'):
            yield found
            found = []
        else:
            found.append(line)


def _parse_graph(lines: Sequence[str]) -> Graph:
    # Columns of fixed width: numbers of three digits have no space between them.
    num_atoms, num_bonds = int(lines[3][0:3]), int(lines[3][3:6])
    atoms, bonds = lines[4 : 4 + num_atoms], lines[4 + num_atoms : 4 + num_atoms + num_bonds]
    elements = [line[31:34].strip() for line in atoms]
    charges = np.array([_CHARGES.get(int(line[36:39] or 0), 0) for line in atoms], np.int64)
    for line in lines[4 + num_atoms + num_bonds :]:
        if line.startswith('M  END'):
            break
        if line.startswith('M  CHG'):
            pairs = np.array(line[9:].split(), np.int64).reshape(-1, 2)
            charges[pairs[:, 0] - 1] = pairs[:, 1]
    table = np.array([[line[i : i + 3] for i in (0, 3, 6)] for line in bonds]).reshape(-1, 3)
    table = table.astype(np.int64)
    ends, orders = table[:, :2] - 1, table[:, 2]
    for i in np.flatnonzero(charges[ends].prod(1) == -1):
        orders[i] += 1
        charges[ends[i]] = 0
    # An aromatic bond counts as one and a half.
    values = np.where(orders == 4, 1.5, orders)
    degree = np.bincount(ends.ravel(), minlength=num_atoms)
    valence = np.bincount(ends.ravel(), np.repeat(values, 2), num_atoms)
    known = ATOM_FEATURES['element']
    kinds = [known.index(e) if e in known else len(known) - 1 for e in elements]
    numbers = (np.array(kinds), degree, charges.clip(-2, 2) + 2, valence.clip(0, 6))
    return Graph(
        np.stack(numbers, 1).astype(np.uint8),
        (orders.clip(1, 4)[:, None] - 1).astype(np.uint8),
        ends.astype(np.int32),
    )


def _parse_fields(lines: Sequence[str]) -> dict[str, str]:
    """Returns the first line of each data field, by its name."""
    return {
        line[line.index('<') + 1 : line.index('>', line.index('<'))]: value.strip()
        for line, value in itertools.pairwise(lines)
        if line.startswith('>') and '<' in line
    }
