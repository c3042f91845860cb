# SPDX-License-Identifier: Apache-2.0
"""The bundled transforms and the randomness they draw."""

from __future__ import annotations

import numpy as np
import pytest

from data.rng import ExampleRng
from data.transforms import Keep, Normalize, OneHot, RandomCrop, RandomFlip, Rename, ToFloat


def rng(n: int, stream: int = 0) -> ExampleRng:
    return ExampleRng(0, stream, np.zeros(n, np.int64), np.arange(n))


def test_to_float_and_normalize() -> None:
    batch = {'image': np.array([[0, 255]], np.uint8), 'label': np.array([1])}
    scaled = ToFloat()(batch)['image']
    assert scaled.dtype == np.float32
    assert scaled.tolist() == [[0.0, 1.0]]
    assert Normalize(mean=(0.0, 155.0), std=10.0)(batch)['image'].tolist() == [[0.0, 10.0]]


def test_fields() -> None:
    batch = {'image': np.zeros(2), 'label': np.array([2, 0])}
    assert OneHot(num_classes=3)(batch)['label'].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert list(Keep(keys=('label',))(batch)) == ['label']
    assert list(Rename(names={'image': 'inputs'})(batch)) == ['inputs', 'label']


def test_crop_shifts_and_flip_mirrors() -> None:
    images = np.arange(1, 13, dtype=np.uint8).reshape(1, 3, 4, 1).repeat(300, 0)
    cropped = RandomCrop(padding=1)({'image': images}, rng(300))['image']
    assert cropped.shape == images.shape
    seen = {x.tobytes() for x in cropped}
    padded = np.pad(images[0], ((1, 1), (1, 1), (0, 0)))
    possible = {padded[i : i + 3, j : j + 4].tobytes() for i in range(3) for j in range(3)}
    assert seen == possible
    flipped = RandomFlip()({'image': images}, rng(300))['image']
    assert {x.tobytes() for x in flipped} == {images[0].tobytes(), images[0][:, ::-1].tobytes()}


def test_draws_are_uniform_and_independent() -> None:
    random = rng(100_000)
    first, second = random.uniform(), random.uniform()
    for draw in (first, second, rng(100_000, stream=1).uniform()):
        assert draw.mean() == pytest.approx(0.5, abs=0.005)
        assert draw.var() == pytest.approx(1 / 12, abs=0.002)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.015
    assert abs(np.corrcoef(first, rng(100_000, stream=1).uniform())[0, 1]) < 0.015
    normal = random.normal((2,))
    assert normal.shape == (100_000, 2)
    assert normal.std() == pytest.approx(1, abs=0.01)
    assert set(random.integers(2, 5).tolist()) == {2, 3, 4}
