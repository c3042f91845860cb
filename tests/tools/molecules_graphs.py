# SPDX-License-Identifier: Apache-2.0
"""Writes the graphs of the molecules of the blood-brain barrier, and their splits.

    pip install rdkit
    python tests/tools/molecules_graphs.py

It reads `data/molecules/blood_brain_barrier.tsv.gz` and writes the file that is read in training,
`data/molecules/blood_brain_barrier.npz`. Two of the 7,807 molecules are left out: rdkit cannot read
them, because a positive carbon in them has four bonds.
"""

from __future__ import annotations

import gzip
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.data.molecules import FILE, SPLITS  # noqa: E402
from trainer.data.smiles import write  # noqa: E402

TABLE = FILE.with_name('blood_brain_barrier.tsv.gz')
DECISIONS = {'BBB+': 1, 'BBB-': 0}
UNREADABLE = {
    'C[N+]1(C)CCC[C@H](OC(=O)[C+](O)(c2ccccc2)c2ccccc2)C1',
    'C[N+]1(C)CCCC(OC(=O)[C+](O)(c2ccccc2)c2ccccc2)C1',
}


def read_molecules() -> tuple[list[str], dict[str, list[float | None]]]:
    """Returns the SMILES of the molecules that rdkit can read, and their labels."""
    with gzip.open(TABLE, 'rt') as file:
        rows = [line.rstrip('\n').split('\t') for line in file][1:]
    rows = [row for row in rows if row[0] not in UNREADABLE]
    return [smiles for smiles, _, _ in rows], {
        'bbb': [DECISIONS[bbb] for _, _, bbb in rows],
        'logbb': [float(logbb) if logbb else None for _, logbb, _ in rows],
    }


if __name__ == '__main__':
    written = write(str(FILE), *read_molecules())
    for kind, indices in written.splits.items():
        counts = {name: int((indices == i).sum()) for i, name in enumerate(SPLITS)}
        print(f'{kind}: {counts}')
