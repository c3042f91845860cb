# SPDX-License-Identifier: Apache-2.0
"""The bundled MNIST files are intact, and a damaged copy is reported."""

from __future__ import annotations

import gzip
import pathlib
import re
import shutil

import numpy as np
import pytest

from tests.command import ROOT
from trainer.data.mnist import MNIST
from trainer.data.sources import ArraySpec

LABELS = 't10k-labels-idx1-ubyte.gz'


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> pathlib.Path:
    for path in (ROOT / 'data' / 'mnist').glob('t10k*.gz'):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ('split', 'length', 'counts', 'first'),
    [
        (
            'train',
            60_000,
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
            [5, 0, 4, 1, 9],
        ),
        ('test', 10_000, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009], [7, 2, 1, 0, 4]),
    ],
)
def test_number_of_examples_and_classes(
    split: str, length: int, counts: list[int], first: list[int]
) -> None:
    source = MNIST(split)
    assert len(source) == length
    labels = source.gather(np.arange(length))['label']
    assert np.bincount(labels).tolist() == counts
    assert labels[:5].tolist() == first


def test_spec() -> None:
    assert MNIST('test').spec == {
        'image': ArraySpec((28, 28, 1), np.dtype('uint8')),
        'label': ArraySpec((), np.dtype('int32')),
    }


@pytest.mark.slow
def test_pixels() -> None:
    """The usual mean for normalization, and a digit centered in its image."""
    images = MNIST('train').gather(np.arange(60_000))['image']
    assert images.mean() / 255 == pytest.approx(0.1307, abs=0.00005)
    assert images.std() / 255 == pytest.approx(0.3081, abs=0.00005)
    # The first training image is a five, whose top row of ink is the sixth; not its transpose.
    ink = images[0, :, :, 0] > 0
    assert np.flatnonzero(ink.any(axis=1))[[0, -1]].tolist() == [5, 24]
    assert np.flatnonzero(ink.any(axis=0))[[0, -1]].tolist() == [4, 23]


def test_limit() -> None:
    source = MNIST('test', limit=3)
    assert len(source) == 3
    assert source.gather(np.arange(3))['label'].tolist() == [7, 2, 1]


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="'validation' is none of train, test"):
        MNIST('validation')


def test_another_directory(copy: pathlib.Path) -> None:
    assert len(MNIST('test', directory=str(copy))) == 10_000


@pytest.mark.slow
@pytest.mark.parametrize('name', ['t10k-images-idx3-ubyte.gz', LABELS])
def test_changed_content(copy: pathlib.Path, name: str) -> None:
    content = bytearray(gzip.decompress((copy / name).read_bytes()))
    content[-1] ^= 1
    (copy / name).write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(ValueError, match=f'{re.escape(str(copy / name))} is damaged'):
        MNIST('test', directory=str(copy))


@pytest.mark.parametrize('place', [0, 9, 40, 1000, 3080, -6, -1])
def test_a_flipped_byte_of_the_compressed_file(copy: pathlib.Path, place: int) -> None:
    """Gzip detects some of these, with several kinds of errors; each message names the file."""
    content = bytearray((copy / LABELS).read_bytes())
    content[place] ^= 0xFF
    (copy / LABELS).write_bytes(bytes(content))
    # Byte 9 names the operating system that compressed; it says nothing of the content.
    if place == 9:
        assert len(MNIST('test', directory=str(copy))) == 10_000
        return
    with pytest.raises(ValueError, match=re.escape(str(copy / LABELS))):
        MNIST('test', directory=str(copy))


@pytest.mark.parametrize('length', [0, 5, 50, 4000])
def test_a_truncated_file(copy: pathlib.Path, length: int) -> None:
    (copy / LABELS).write_bytes((copy / LABELS).read_bytes()[:length])
    with pytest.raises(ValueError, match=re.escape(str(copy / LABELS))):
        MNIST('test', directory=str(copy))


def test_a_missing_file(copy: pathlib.Path) -> None:
    (copy / LABELS).unlink()
    with pytest.raises(ValueError, match=re.escape(str(copy / LABELS))):
        MNIST('test', directory=str(copy))
