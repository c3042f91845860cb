# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST, read from the files of a Debian package."""

from __future__ import annotations

import os
import pathlib

import numpy as np

from . import idx
from .sources import ArraySource

# Where Debian's package puts the files.
DIRECTORY = '/usr/share/datasets/fashion-mnist'

_FILES = {'train': 'train', 'test': 't10k'}

# Of the unpacked files.
_SHA256 = {
    't10k-images-idx3-ubyte': '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
    't10k-labels-idx1-ubyte': '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
    'train-images-idx3-ubyte': 'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
    'train-labels-idx1-ubyte': 'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
}


class FashionMNIST(ArraySource):
    """28 x 28 grey images of clothes in ten classes: 60,000 to train, 10,000 to test.

    Fields: `image` uint8 (28, 28, 1), `label` int32 (). The data is by Xiao, Rasul and Vollgraf,
    2017 (MIT licence); it is not part of this package.
    """

    def __init__(self, split: str, *, limit: int | None = None, directory: str = DIRECTORY):
        """Reads a split.

        Args:
            split: 'train' or 'test'.
            limit: use only this many examples from the start.
            directory: where the four gzip files are.

        Raises:
            ValueError: if the split is unknown, or a file is missing or damaged.
        """
        if split not in _FILES:
            raise ValueError(f'split: {split!r} is none of {", ".join(_FILES)}')
        root = pathlib.Path(os.path.expanduser(directory))
        images = self._read(root, f'{_FILES[split]}-images-idx3-ubyte')
        labels = self._read(root, f'{_FILES[split]}-labels-idx1-ubyte')
        super().__init__(
            {'image': images[..., None], 'label': labels.astype(np.int32)}, limit=limit
        )

    def _read(self, root: pathlib.Path, name: str) -> np.ndarray:
        path = root / f'{name}.gz'
        if not path.exists():
            raise ValueError(
                f'there is no {path}. On Debian and Ubuntu, install the files:\n'
                '  sudo apt-get install dataset-fashion-mnist\n'
                'Elsewhere, get them from https://github.com/zalandoresearch/fashion-mnist '
                '(data/fashion), and set `directory`'
            )
        return idx.read(path, _SHA256[name])
