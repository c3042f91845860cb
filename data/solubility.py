# SPDX-License-Identifier: Apache-2.0
"""The solubility of molecules in water, read from files of this project or of your own."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from . import molecules, sdf
from .checked_file import read_bytes

SPLITS = ('train', 'test')

_FOLDER = pathlib.Path(molecules.__file__).parent
# Of the unpacked files.
_SHA256 = {
    'train': '184a7df425f4a5403d8572c7cf898d259801332f0b7f4fcfab91ccb9aba2994e',
    'test': '71fbac86a75146b2f7a142f8939c159435d20813fbc0022f9fce0510f0e7ee02',
}


class Solubility:
    """Molecules with their solubility, as items for `trainer.data.graphs:GraphSource`.

    `solubility` is float32 (): the logarithm to base 10 of moles per liter, at about 25 degrees
    Celsius. `name` is text. The features of atoms and bonds are those of `trainer.data.sdf`.
    """

    def __init__(self, split: str, *, path: str | None = None, limit: int | None = None):
        """Reads the molecules.

        Args:
            split: 'train' (1,025 molecules) or 'test' (257), as the file's authors split them.
            path: SDF files of your own with '{split}' in their name, such as 'mine-{split}.sdf';
                their field `SOL` is the label.
            limit: use only this many molecules from the start.

        Raises:
            ValueError: if the split is unknown, or a file cannot be read.
        """
        self._examples = [
            {
                **record.graph.to_example(),
                'solubility': np.float32(record.fields['SOL']),
                'name': record.fields.get('NAME', ''),
            }
            for record in read_split(split, path)[:limit]
        ]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._examples[index]


def read_split(split: str, path: str | None = None) -> list[sdf.Record]:
    """Returns the molecules of a split; for the arguments see `Solubility`.

    Raises:
        ValueError: if the split is unknown, or a file cannot be read or has no field `SOL`.
    """
    if split not in SPLITS:
        raise ValueError(f'split: {split!r} is none of {", ".join(SPLITS)}')
    if path is None:
        file = _FOLDER / f'solubility_{split}.sdf.gz'
        content = read_bytes(file, _SHA256[split])
    else:
        file = pathlib.Path(os.path.expanduser(path.replace('{split}', split)))
        content = read_bytes(file)
    try:
        records = sdf.parse(content.decode())
        missing = [i for i, record in enumerate(records, 1) if 'SOL' not in record.fields]
        if missing or not records:
            raise ValueError(
                f'molecule {missing[0]} has no field SOL' if missing else 'it has no molecules'
            )
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from error
    return records
