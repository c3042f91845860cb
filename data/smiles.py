# SPDX-License-Identifier: Apache-2.0
"""Makes graphs of molecules from SMILES, with the package rdkit.

    pip install rdkit
    python -m trainer.data.smiles molecules.tsv molecules.npz

`molecules.tsv` has a line for each molecule, with tabs between its columns. The first line has the
names of the columns; the first column is the SMILES. Each other column is a label: a decision if
all its values are 0 or 1, otherwise a number. A label may be missing. The graphs, labels and splits
are written to `molecules.npz`, which is read without rdkit (`trainer.data.molecules:Molecules`).
"""

from __future__ import annotations

import collections
import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .molecules import KINDS, Graph, MoleculeFile, save

# Values of the features; each is stored as the index of its value. The last value of an element,
# and of an hybridization, is any other; numbers are clipped to the range.
ATOM_FEATURES: Mapping[str, tuple[Any, ...]] = {
    'element': ('C', 'N', 'O', 'S', 'F', 'Cl', 'Br', 'I', 'P', 'B', 'Si', 'other'),
    'degree': (0, 1, 2, 3, 4, 5, 6),
    'charge': (-2, -1, 0, 1, 2),
    'hydrogens': (0, 1, 2, 3, 4),
    'hybridization': ('SP', 'SP2', 'SP3', 'other'),
    'is_aromatic': (0, 1),
    # Atoms of the smallest ring that it belongs to, 0 for none.
    'ring_size': (0, 1, 2, 3, 4, 5, 6, 7, 8),
    'chirality': ('', 'R', 'S'),
}
BOND_FEATURES: Mapping[str, tuple[Any, ...]] = {
    'order': ('SINGLE', 'DOUBLE', 'TRIPLE', 'AROMATIC', 'other'),
    'is_conjugated': (0, 1),
    'is_in_ring': (0, 1),
    'stereo': ('', 'STEREOE', 'STEREOZ'),
}
# Number of values of each feature, for embeddings.
ATOM_SIZES = tuple(len(values) for values in ATOM_FEATURES.values())
BOND_SIZES = tuple(len(values) for values in BOND_FEATURES.values())

_INSTALL = 'pip install rdkit'


class SmilesGraphs:
    """Molecules of your own, as items for `trainer.data.graphs:GraphSource`, to predict on."""

    def __init__(self, smiles: Sequence[str]):
        """Makes the graphs.

        Raises:
            ValueError: if rdkit is not installed, or a text is no molecule.
        """
        self._examples = [{**to_graph(each).to_example(), 'smiles': each} for each in smiles]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._examples[index]


def to_graph(smiles: str) -> Graph:
    """Returns the graph of a molecule, without hydrogen atoms.

    Raises:
        ValueError: if rdkit is not installed, or the text is no molecule.
    """
    molecule = _parse(smiles)
    atoms = [_read_atom(atom) for atom in molecule.GetAtoms()]
    bonds = [_read_bond(bond) for bond in molecule.GetBonds()]
    ends = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    return Graph(
        _encode(atoms, ATOM_FEATURES),
        _encode(bonds, BOND_FEATURES),
        np.array(ends, np.int32).reshape(-1, 2),
    )


def find_scaffold(smiles: str) -> str:
    """Returns the rings of a molecule and what joins them (Bemis and Murcko 1996), as SMILES.

    Raises:
        ValueError: if rdkit is not installed, or the text is no molecule.
    """
    molecule = _parse(smiles)
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return MurckoScaffold.MurckoScaffoldSmiles(mol=molecule, includeChirality=False)


def write(
    path: str, smiles: Sequence[str], labels: Mapping[str, Sequence[float | None]]
) -> MoleculeFile:
    """Writes the graphs, labels and splits of molecules, in the order of their hashes.

    Args:
        path: of the file, which ends in '.npz'.
        smiles: the molecules.
        labels: by name, one of each molecule, None if it is missing. Those of which all are 0 or 1
            are decisions.

    Returns:
        What has been written.

    Raises:
        ValueError: if rdkit is not installed, or a text is no molecule.
    """
    order = sorted(range(len(smiles)), key=lambda i: _hash(smiles[i]))
    texts = [smiles[i] for i in order]
    splits = {'random': split_in_order(len(texts)), 'scaffold': split_by_scaffold(texts)}
    file = MoleculeFile(
        smiles=texts,
        graphs=[to_graph(each) for each in texts],
        labels={name: _to_array([values[i] for i in order]) for name, values in labels.items()},
        splits={kind: splits[kind] for kind in KINDS},
    )
    save(path, file)
    return file


def split_in_order(count: int) -> np.ndarray:
    """Returns the split of each molecule: the first 80 % for training, then 10 and 10 %."""
    return np.searchsorted([int(0.8 * count), int(0.9 * count)], np.arange(count), 'right').astype(
        np.uint8
    )


def split_by_scaffold(smiles: Sequence[str]) -> np.ndarray:
    """Returns the split of each molecule; those of one scaffold are in the same.

    The scaffolds are taken in the order of the number of their molecules, most frequent first: each
    goes to training if it still fits into 80 %, otherwise to development if it fits into 10 %,
    otherwise to testing. This is the usual scaffold split (Wu et al. 2018, arXiv:1703.00564).
    """
    groups = collections.defaultdict(list)
    for i, each in enumerate(smiles):
        groups[find_scaffold(each)].append(i)
    free = [int(0.8 * len(smiles)), int(0.9 * len(smiles)) - int(0.8 * len(smiles)), len(smiles)]
    splits = np.zeros(len(smiles), np.uint8)
    # Those of equal size in the order of their hashes, which does not depend on that of the file.
    for scaffold in sorted(groups, key=lambda s: (-len(groups[s]), _hash(s))):
        members = groups[scaffold]
        splits[members] = index = next(i for i in range(3) if free[i] >= len(members))
        free[index] -= len(members)
    return splits


def read_table(path: str) -> tuple[list[str], dict[str, list[float | None]]]:
    """Returns the SMILES and the labels of a table: see the module.

    Raises:
        ValueError: if the file cannot be read, or a line is broken.
    """
    try:
        with open(path, encoding='utf-8-sig') as file:
            names, *rows = [line.rstrip('\r\n').split('\t') for line in file]
        for number, row in enumerate(rows, 2):
            if len(row) != len(names) or not row[0]:
                raise ValueError(f'line {number} is not {" and ".join(names)}, with tabs: {row}')
        columns = {
            name: [float(row[i]) if row[i] else None for row in rows]
            for i, name in enumerate(names[1:], 1)
        }
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} cannot be read: {error}') from error
    return [row[0] for row in rows], columns


def _parse(smiles: str) -> Any:
    try:
        from rdkit import Chem, rdBase
    except ImportError as error:
        raise ValueError(
            f'SMILES are read by a package that is not installed; install it with: {_INSTALL}'
        ) from error
    # Its messages have no prefix, and the error below says the same.
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or not molecule.GetNumAtoms():
        raise ValueError(f'{smiles!r} is no molecule, or one with an impossible bond')
    return molecule


def _read_atom(atom: Any) -> tuple[Any, ...]:
    ring = next((size for size in range(3, 8) if atom.IsInRingSize(size)), 8)
    return (
        atom.GetSymbol(),
        atom.GetDegree(),
        atom.GetFormalCharge(),
        atom.GetTotalNumHs(),
        str(atom.GetHybridization()),
        int(atom.GetIsAromatic()),
        ring if atom.IsInRing() else 0,
        atom.GetProp('_CIPCode') if atom.HasProp('_CIPCode') else '',
    )


def _read_bond(bond: Any) -> tuple[Any, ...]:
    stereo = str(bond.GetStereo())
    return (
        str(bond.GetBondType()),
        int(bond.GetIsConjugated()),
        int(bond.IsInRing()),
        stereo if stereo in BOND_FEATURES['stereo'] else '',
    )


def _encode(rows: Sequence[tuple[Any, ...]], features: Mapping[str, tuple[Any, ...]]) -> np.ndarray:
    """Returns the index of each value of each feature, uint8 (rows, features)."""

    def find(value: Any, values: tuple[Any, ...]) -> int:
        if isinstance(value, int):
            value = min(max(value, values[0]), values[-1])
        return values.index(value) if value in values else len(values) - 1

    found = [list(map(find, row, features.values())) for row in rows]
    return np.array(found, np.uint8).reshape(-1, len(features))


def _to_array(values: Sequence[float | None]) -> np.ndarray:
    """Returns decisions as int32, -1 for a missing one, and numbers as float32, NaN for those."""
    if all(value in (None, 0, 1) for value in values):
        return np.array([-1 if value is None else value for value in values], np.int32)
    return np.array([np.nan if value is None else value for value in values], np.float32)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


if __name__ == '__main__':
    source, target = sys.argv[1:]
    written = write(target, *read_table(source))
    print(f'{len(written.smiles):,} molecules, labels: {", ".join(written.labels)}')
