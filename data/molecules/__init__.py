# SPDX-License-Identifier: Apache-2.0
"""Molecules as graphs of atoms and bonds, read from the files beside this one or from your own."""

from __future__ import annotations

import functools
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FILE = pathlib.Path(__file__).parent / 'blood_brain_barrier.npz'

SPLITS = ('train', 'dev', 'test')
KINDS = ('random', 'scaffold')


class Graph(NamedTuple):
    """A molecule without its labels.

    Attributes:
        atoms: uint8 (atoms, features), see `trainer.data.smiles.ATOM_FEATURES`.
        bonds: uint8 (bonds, features), see `trainer.data.smiles.BOND_FEATURES`.
        ends: int32 (bonds, 2), the atoms that each bond joins.
    """

    atoms: np.ndarray
    bonds: np.ndarray
    ends: np.ndarray

    def to_example(self) -> dict[str, np.ndarray]:
        """Returns the fields of a graph for `trainer.data.graphs:GraphSource`.

        Each bond is there twice, once from either end. Features are int32.
        """
        one, other = self.ends.T
        return {
            'nodes': self.atoms.astype(np.int32),
            'edges': np.concatenate([self.bonds, self.bonds]).astype(np.int32),
            'senders': np.concatenate([one, other]),
            'receivers': np.concatenate([other, one]),
        }


class Molecules:
    """The molecules of a split, as items for `trainer.data.graphs:GraphSource`.

    By default those of the blood-brain barrier: `bbb` int32 (), 1 for a molecule that crosses it,
    and `logbb` float32 (), the logarithm of the ratio of its concentrations in brain and blood,
    which few molecules have. A decision that is missing is -1, a number NaN. `smiles` is text.
    """

    def __init__(
        self,
        split: str,
        *,
        kind: str = 'random',
        path: str | None = None,
        limit: int | None = None,
    ):
        """Reads the molecules.

        Args:
            split: 'train', 'dev' or 'test': 80, 10 and 10 % of the molecules.
            kind: 'random', or 'scaffold' for splits without a ring system in common: those of
                training have the frequent ones, those of testing the rare ones.
            path: a file of your own, by `trainer.data.smiles:write`.
            limit: use only this many molecules from the start; those of the blood-brain barrier are
                in random order.

        Raises:
            ValueError: if an argument is unknown, or the file cannot be read.
        """
        if split not in SPLITS or kind not in KINDS:
            raise ValueError(
                f'split, kind: {split!r}, {kind!r}; expected one of {", ".join(SPLITS)}, and one '
                f'of {", ".join(KINDS)}'
            )
        self._file = _read_shipped() if path is None else read(os.path.expanduser(path))
        self._chosen = np.flatnonzero(self._file.splits[kind] == SPLITS.index(split))[:limit]
        if not len(self._chosen):
            raise ValueError(f'{path or FILE} has no molecules in the {kind} split {split!r}')

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = self._chosen[index]
        return {
            **self._file.graphs[i].to_example(),
            'smiles': self._file.smiles[i],
            **{name: values[i] for name, values in self._file.labels.items()},
        }


class MoleculeFile(NamedTuple):
    """The contents of a file of M molecules.

    Attributes:
        smiles: text of each molecule.
        graphs: of each molecule.
        labels: by name, int32 (M,) of 0, 1 and -1 for decisions, float32 (M,) for numbers.
        splits: by kind, uint8 (M,), index of its split in `SPLITS`.
    """

    smiles: Sequence[str]
    graphs: Sequence[Graph]
    labels: Mapping[str, np.ndarray]
    splits: Mapping[str, np.ndarray]


def read(path: str | os.PathLike[str]) -> MoleculeFile:
    """Returns the contents of a file.

    Raises:
        ValueError: if there is no such file, or it was not written by `save`.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
        starts = [np.cumsum(arrays[name][:-1], dtype=np.int64) for name in ('n_atom', 'n_bond')]
        parts = [
            np.split(arrays['atoms'], starts[0]),
            np.split(arrays['bonds'], starts[1]),
            np.split(arrays['ends'].astype(np.int32), starts[1]),
        ]
        return MoleculeFile(
            smiles=arrays['smiles'].tobytes().decode().split('\n'),
            graphs=[Graph(*each) for each in zip(*parts, strict=True)],
            labels={
                name.removeprefix('label/'): x.astype(np.int32 if x.dtype == np.int8 else x.dtype)
                for name, x in arrays.items()
                if name.startswith('label/')
            },
            splits={kind: arrays[f'split/{kind}'] for kind in KINDS},
        )
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f'{path}, relative to {os.getcwd()}, is no file of molecules ({error}); expected one '
            'that trainer.data.smiles has written'
        ) from error


@functools.cache
def _read_shipped() -> MoleculeFile:
    return read(FILE)


def save(path: str | os.PathLike[str], file: MoleculeFile) -> None:
    """Writes a file of molecules, compressed."""
    # The decisions are distinguished by their dtype.
    graphs = file.graphs
    np.savez_compressed(
        path,
        smiles=np.frombuffer('\n'.join(file.smiles).encode(), np.uint8),
        n_atom=np.array([len(g.atoms) for g in graphs], np.uint16),
        n_bond=np.array([len(g.bonds) for g in graphs], np.uint16),
        atoms=np.concatenate([g.atoms for g in graphs]),
        bonds=np.concatenate([g.bonds for g in graphs]),
        ends=np.concatenate([g.ends for g in graphs]).astype(np.uint16),
        allow_pickle=False,
        **{
            f'label/{name}': x.astype(np.int8 if x.dtype == np.int32 else x.dtype)
            for name, x in file.labels.items()
        },
        **{f'split/{kind}': values for kind, values in file.splits.items()},
    )
