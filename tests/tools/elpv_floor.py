# SPDX-License-Identifier: Apache-2.0
"""The floors of `configs/imagenet.py:elpv`, on its own split, and how the split was chosen.

    python tests/tools/elpv_floor.py
    python tests/tools/elpv_floor.py --ids > data/elpv_test.txt

Prints the accuracy of the most frequent class; of the label of the training photograph whose number
is nearest, as the numbers follow the modules; and of a ridge regression on the photographs in
24 x 24 pixels together with the contrast within each of these.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import pathlib
import re
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.data import elpv  # noqa: E402
from trainer.data.images import Decode  # noqa: E402
from trainer.data.rng import ExampleRng  # noqa: E402
from trainer.evaluate.linear_probe import classify  # noqa: E402

_CELLS = 24


def choose_test_ids(rows: list[tuple[str, float, str]]) -> list[str]:
    """Returns a quarter of the photographs of each probability and kind, sorted.

    Args:
        rows: as from `trainer.data.elpv:read_labels`.
    """
    groups = collections.defaultdict(list)
    for name, defect, kind in rows:
        groups[defect, kind].append(pathlib.PurePosixPath(name).stem)
    # By a hash, so that the choice depends on nothing but the names.
    ordered = (
        sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        for names in groups.values()
    )
    return sorted(name for names in ordered for name in names[: (len(names) + 2) // 4])


def floors() -> dict[str, float]:
    """Returns accuracies on the test split, by name."""
    train, test = (_read(split) for split in ('train', 'test'))
    frequent = np.bincount(train[1]).argmax()
    classes = classify(train[0], train[1], test[0])
    return {
        'the most frequent class': float((test[1] == frequent).mean()),
        'the label of the nearest number': score_nearest_numbers(),
        'ridge regression on pixels and contrasts': float((test[1] == classes).mean()),
    }


def score_nearest_numbers(directory: str | None = None) -> float:
    """Returns the accuracy of the label of the training photograph that is nearest in number.

    Args:
        directory: as of `trainer.data.elpv:ELPV`.
    """
    (train, labels), (test, expected) = (
        _read_numbers(split, directory) for split in ('train', 'test')
    )
    # Of two that are as near, the first one.
    nearest = np.abs(train - test[:, None]).argmin(1)
    return float((labels[nearest] == expected).mean())


def _read_numbers(split: str, directory: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns numbers, 17 for cell0017.png, and labels of a split."""
    source = elpv.ELPV(split, directory=directory)
    examples = source.gather(np.arange(len(source)))
    numbers = [re.findall(r'\d+', pathlib.PurePath(path).stem)[0] for path in examples['path']]
    return np.array(numbers).astype(int), examples['label']


def _read(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns features (examples, width) and labels of a split."""
    source = elpv.ELPV(split)
    ids = np.arange(len(source))
    decode = Decode(size=12 * _CELLS, crop='center', channels=1, center=1.0)
    images = decode(source.gather(ids), ExampleRng(0, 0, ids, ids))['image'][..., 0]
    cells = images.reshape(len(ids), _CELLS, 12, _CELLS, 12).astype(np.float32)
    features = np.stack([cells.mean((2, 4)), cells.std((2, 4))], axis=-1)
    return features.reshape(len(ids), -1).astype(np.float64), source.gather(ids)['label']


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--ids', action='store_true', help='print the ids of the test split')
    if parser.parse_args().ids:
        print('\n'.join(choose_test_ids(elpv.read_labels(elpv.find_installed()))))
    else:
        for name, accuracy in floors().items():
            print(f'{100 * accuracy:.1f} % {name}')
