# SPDX-License-Identifier: Apache-2.0
"""The floors of `configs/molecules.py` and `configs/karate.py`.

    pip install rdkit scikit-learn
    python tests/tools/molecules_floor.py

Blood-brain barrier: logistic regression on 2,048 bits of a fingerprint, which say what there is
around each atom, up to two bonds away (Morgan). Solubility: least squares on the number of atoms of
each element and of bonds of each order. Karate club: the leader that fewer friendships lead to; a
member as far from both counts as half. Nothing is tuned. The fingerprints need rdkit.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.data import karate  # noqa: E402
from trainer.data.molecules import KINDS, SPLITS, Molecules  # noqa: E402
from trainer.data.sdf import ATOM_SIZES, BOND_SIZES  # noqa: E402
from trainer.data.solubility import read_split  # noqa: E402


def score_fingerprints(kind: str) -> dict[str, tuple[float, float]]:
    """Returns the AUC and the average precision on the splits 'dev' and 'test' of a kind."""
    from sklearn import linear_model, metrics

    inputs, labels = {}, {}
    for split in SPLITS:
        items = Molecules(split, kind=kind)
        inputs[split] = _make_fingerprints([item['smiles'] for item in items])
        labels[split] = [item['bbb'] for item in items]
    model = linear_model.LogisticRegression(max_iter=1000).fit(inputs['train'], labels['train'])
    found = {}
    for split in ('dev', 'test'):
        scores = model.decision_function(inputs[split])
        measures = (metrics.roc_auc_score, metrics.average_precision_score)
        auc, precision = (float(measure(labels[split], scores)) for measure in measures)
        found[split] = (auc, precision)
    return found


def score_counts() -> float:
    """Returns the mean squared error on the test split of the solubility."""
    parts = {split: _count_parts(split) for split in ('train', 'test')}
    weights, *_ = np.linalg.lstsq(*parts['train'], rcond=None)
    inputs, targets = parts['test']
    return float(np.square(inputs @ weights - targets).mean())


def score_distances() -> float:
    """Returns the share of the 32 members whose nearer leader is the one they followed."""
    graph = karate.make_graph()
    distances = []
    for leader in (karate.INSTRUCTOR, karate.PRESIDENT):
        steps = np.where(np.arange(karate.MEMBERS) == leader, 0, karate.MEMBERS)
        for _ in range(karate.MEMBERS):
            np.minimum.at(steps, graph['receivers'], steps[graph['senders']] + 1)
        distances.append(steps)
    [side] = karate.KarateClub('test').gather(np.array([0]))['side']
    nearer = np.sign(distances[0] - distances[1])
    credit = np.where(nearer == 0, 0.5, (nearer > 0) == side)
    return float(credit[side >= 0].mean())


def _make_fingerprints(smiles: list[str]) -> np.ndarray:
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator

    make = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    bits = [make.GetFingerprintAsNumPy(Chem.MolFromSmiles(each)) for each in smiles]
    return np.stack(bits).astype(np.float64)


def _count_parts(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns counts and 1 for each molecule of a split, and its solubility."""
    records = read_split(split)
    counts = [
        [
            *np.bincount(record.graph.atoms[:, 0], minlength=ATOM_SIZES[0]),
            *np.bincount(record.graph.bonds[:, 0], minlength=BOND_SIZES[0]),
            1,
        ]
        for record in records
    ]
    return np.array(counts, np.float64), np.array([float(r.fields['SOL']) for r in records])


if __name__ == '__main__':
    print(f'solubility, test: mean squared error {score_counts():.2f}')
    print(f'karate club, test: accuracy {100 * score_distances():.1f} %')
    for name in KINDS:
        for each, (area, precise) in score_fingerprints(name).items():
            print(f'{name} split, {each}: AUC {area:.3f}, average precision {precise:.3f}')
