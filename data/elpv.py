# SPDX-License-Identifier: Apache-2.0
"""Photographs of solar cells, intact or defective, read from an installed package."""

from __future__ import annotations

import importlib.util
import pathlib

import numpy as np

from .sources import ArraySource

# The photographs of the test split, one a line; `tests/tools/elpv_floor.py` says how they were
# chosen.
TEST_IDS = pathlib.Path(__file__).with_name('elpv_test.txt')

_INSTALL = 'pip install elpv-dataset'


class ELPV(ArraySource):
    """2,624 photographs of solar cells by the light that they emit, 300 x 300 pixels, grey.

    Fields: `path` text, for `data.images:Decode`; `label` int32 (), 1 for a defective cell; `kind`
    text, 'mono' or 'poly' for a mono- or polycrystalline cell.

    Experts stated the probability of a defect: 0, 1/3, 2/3 or 1. As in Deitsch et al. 2019,
    "Automatic classification of defective photovoltaic module cells in electroluminescence images",
    above one half counts as defective. The data is by Buerhop-Lutz et al., 2018 (licence
    CC BY-NC-SA 4.0: not for commercial use); it is not part of this package.
    """

    def __init__(self, split: str, *, limit: int | None = None, directory: str | None = None):
        """Lists the photographs of a split, without reading them.

        Args:
            split: 'train' or 'test', three quarters and one quarter of the photographs.
            limit: use only this many photographs from the start.
            directory: where `labels.csv` and the photographs are; by default in the installed
                package.

        Raises:
            ValueError: if the split is unknown, or the package is not installed.
        """
        if split not in ('train', 'test'):
            raise ValueError(f"split: {split!r} is neither 'train' nor 'test'")
        root = find_installed() if directory is None else pathlib.Path(directory).expanduser()
        tests = set(TEST_IDS.read_text(encoding='utf-8').split())
        rows = [row for row in read_labels(root) if (_id_of(row[0]) in tests) == (split == 'test')]
        super().__init__(
            {
                'path': np.array([str(root / name) for name, _, _ in rows]),
                'label': np.array([defect > 0.5 for _, defect, _ in rows], np.int32),
                'kind': np.array([kind for _, _, kind in rows]),
            },
            limit=limit,
        )

    def describe(self, index: int) -> str:
        """Returns the path of a photograph, for messages."""
        return str(self.gather(np.array([index]))['path'][0])


def read_labels(root: pathlib.Path) -> list[tuple[str, float, str]]:
    """Returns file, probability of a defect and kind of all photographs below `root`, in order.

    Raises:
        ValueError: if there is no `labels.csv`.
    """
    path = root / 'labels.csv'
    if not path.is_file():
        raise ValueError(
            f'there is no {path}; expected the directory elpv_dataset/data of the package that '
            f'`{_INSTALL}` installs'
        )
    rows = map(str.split, path.read_text(encoding='utf-8').splitlines())
    return [(name, float(defect), kind) for name, defect, kind in rows]


def find_installed() -> pathlib.Path:
    """Returns the directory of `labels.csv` in the installed package.

    Raises:
        ValueError: if it is not installed.
    """
    spec = importlib.util.find_spec('elpv_dataset')
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f'the package with the photographs is not installed:\n  {_INSTALL}\n'
            'If they are elsewhere, set `directory`'
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / 'data'


def _id_of(name: str) -> str:
    return pathlib.PurePosixPath(name).stem
