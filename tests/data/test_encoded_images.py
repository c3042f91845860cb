# SPDX-License-Identifier: Apache-2.0
"""Image files of different sizes, decoded and cut to one size."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from trainer.data.encoded_images import CenterCrop, RandomResizedCrop
from trainer.data.transforms import apply

Image = pytest.importorskip('PIL.Image')


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


def ramp(height: int, width: int) -> np.ndarray:
    """Returns an image whose red is its column, and whose green is its row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def run(transform: Any, pixels: list[np.ndarray], ids: list[int], epoch: int = 0) -> Any:
    files = np.array([encoded(pixels[i]) for i in ids])
    epochs = np.full(len(ids), epoch)
    batch = {'image': files, 'label': np.array(ids)}
    return apply((transform,), batch, seed=0, epochs=epochs, ids=np.array(ids))['image']


IMAGES = [ramp(100 + i, 200 - 5 * i) for i in range(30)]


def test_the_square_in_the_middle() -> None:
    """Of a part of the shorter side, of any image."""
    (image,) = run(CenterCrop(size=75, part=0.75), [ramp(100, 200)], [0])
    assert image.shape == (75, 75, 3)
    assert abs(int(image[0, 0, 0]) - 62) <= 1 and abs(int(image[-1, -1, 0]) - 137) <= 1
    assert abs(int(image[0, 0, 1]) - 12) <= 1 and abs(int(image[-1, -1, 1]) - 87) <= 1
    (grey,) = run(CenterCrop(size=8, part=1.0), [np.full((9, 9), 7, np.uint8)], [0])
    assert (grey == 7).all() and grey.shape == (8, 8, 3)


def test_random_rectangles() -> None:
    """Their areas, ratios and places are within the limits, and differ."""
    crops = run(RandomResizedCrop(size=50, area=(0.2, 0.6)), IMAGES, list(range(30)))
    assert crops.shape == (30, 50, 50, 3) and crops.dtype == np.uint8
    corners = crops.astype(float)
    # The first and last pixels are half a pixel of the crop away from its border.
    width = (corners[:, 0, -1, 0] - corners[:, 0, 0, 0]) * 50 / 49
    height = (corners[:, -1, 0, 1] - corners[:, 0, 0, 1]) * 50 / 49
    sizes = np.array([image.shape[0] * image.shape[1] for image in IMAGES])
    part = width * height / sizes
    assert part.min() > 0.15 and part.max() < 0.63
    assert (width / height).min() > 0.7 and (width / height).max() < 1.4
    assert len(np.unique(corners[:, 0, 0, :2], axis=0)) > 20


def test_a_whole_image() -> None:
    """An area that does not fit at a ratio is limited by the image."""
    (crop,) = run(
        RandomResizedCrop(size=10, area=(1.0, 1.0), ratio=(4.0, 4.0)), [ramp(40, 40)], [0]
    )
    red = crop[:, :, 0].astype(int)
    assert red[0, 0] <= 2 and red[0, -1] >= 37


def test_a_crop_depends_on_the_example_and_the_epoch() -> None:
    transform = RandomResizedCrop(size=20)
    everything = run(transform, IMAGES, list(range(30)))
    np.testing.assert_array_equal(run(transform, IMAGES, [7, 3, 7]), everything[[7, 3, 7]])
    assert (run(transform, IMAGES, [7, 3], epoch=1) != everything[[7, 3]]).any(axis=(1, 2, 3)).all()


def test_other_fields_are_refused() -> None:
    batch = {'image': np.zeros((1, 4, 4, 3), np.uint8)}
    with pytest.raises(
        ValueError, match=r"'image': expected the bytes .* set encoded=\('image',\)"
    ):
        CenterCrop(size=4)(batch)
    with pytest.raises(ValueError, match="'image': Pillow cannot decode an image file"):
        CenterCrop(size=4)({'image': np.array([b'no image'])})
