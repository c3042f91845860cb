# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST, where it is installed, and the message where it is not."""

from __future__ import annotations

import pathlib
import re
import shutil

import numpy as np
import pytest

from tests.command import ROOT
from trainer.data.fashion_mnist import DIRECTORY, FashionMNIST
from trainer.data.sources import ArraySpec

installed = pytest.mark.skipif(
    not pathlib.Path(DIRECTORY).exists(), reason='needs the package dataset-fashion-mnist'
)


@installed
@pytest.mark.parametrize(
    ('split', 'length', 'first'),
    [('train', 60_000, [9, 0, 0, 3, 0]), ('test', 10_000, [9, 2, 1, 1, 6])],
)
def test_the_installed_files(split: str, length: int, first: list[int]) -> None:
    """Ten classes of the same size."""
    source = FashionMNIST(split)
    assert len(source) == length
    assert source.spec == {
        'image': ArraySpec((28, 28, 1), np.dtype('uint8')),
        'label': ArraySpec((), np.dtype('int32')),
    }
    labels = source.gather(np.arange(length))['label']
    assert np.bincount(labels).tolist() == [length // 10] * 10
    assert labels[:5].tolist() == first
    assert len(FashionMNIST(split, limit=3)) == 3


def test_missing_files(tmp_path: pathlib.Path) -> None:
    """The error names the file, and the command that installs it."""
    with pytest.raises(ValueError, match=r'there is no .*t10k-images-idx3-ubyte.gz') as error:
        FashionMNIST('test', directory=str(tmp_path))
    assert 'sudo apt-get install dataset-fashion-mnist' in str(error.value)
    assert 'set `directory`' in str(error.value)


def test_files_of_another_dataset(tmp_path: pathlib.Path) -> None:
    """Those of MNIST have the same names."""
    for path in (ROOT / 'data' / 'mnist').glob('t10k*.gz'):
        shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match=f'{re.escape(str(tmp_path))}.* is damaged'):
        FashionMNIST('test', directory=str(tmp_path))


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="'validation' is none of train, test"):
        FashionMNIST('validation')
