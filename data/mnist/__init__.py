# SPDX-License-Identifier: Apache-2.0
"""MNIST, read from the four files in this directory."""

from __future__ import annotations

import functools
import os
import pathlib

import numpy as np

from .. import idx
from ..sources import ArraySource

_DIRECTORY = pathlib.Path(__file__).parent
_FILES = {'train': 'train', 'test': 't10k'}

# Of the unpacked files.
_SHA256 = {
    't10k-images-idx3-ubyte': '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7',
    't10k-labels-idx1-ubyte': 'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2',
    'train-images-idx3-ubyte': 'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db',
    'train-labels-idx1-ubyte': '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5',
}


class MNIST(ArraySource):
    """28 x 28 grey images of handwritten digits: 60,000 to train, 10,000 to test.

    Fields: `image` uint8 (28, 28, 1), `label` int32 ().
    """

    def __init__(self, split: str, *, limit: int | None = None, directory: str | None = None):
        """Reads a split.

        Args:
            split: 'train' or 'test'.
            limit: use only this many examples from the start.
            directory: where the gzip files are; by default those that come with this package.

        Raises:
            ValueError: if the split is unknown or a file is damaged.
        """
        if split not in _FILES:
            raise ValueError(f'split: {split!r} is none of {", ".join(_FILES)}')
        root = _DIRECTORY if directory is None else pathlib.Path(os.path.expanduser(directory))
        read = _read_cached if directory is None else _read
        images = read(root / f'{_FILES[split]}-images-idx3-ubyte.gz')
        labels = read(root / f'{_FILES[split]}-labels-idx1-ubyte.gz')
        super().__init__(
            {'image': images[..., None], 'label': labels.astype(np.int32)}, limit=limit
        )


def _read(path: pathlib.Path) -> np.ndarray:
    return idx.read(path, _SHA256[path.name.removesuffix('.gz')])


# All readers of the files beside this one share what was unpacked (55 MB; nobody can write to it).
_read_cached = functools.cache(_read)
