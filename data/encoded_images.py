# SPDX-License-Identifier: Apache-2.0
"""Transforms that decode image files and cut out a part, so that all images have one size.

The field has the bytes of a JPEG or PNG file in each example, and becomes uint8 (n, size, size, 3).
Pillow decodes; the worker processes of `GrainLoader` run this on several cores.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np

from .nested import Tree, get_field, with_field
from .rng import ExampleRng


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """Cuts out a random rectangle and resizes it, as is usual for training on ImageNet.

    Attributes:
        size: height and width of the result.
        area: least and largest part of the image.
        ratio: least and largest ratio of width to height.
        key: the field.
    """

    size: int
    area: tuple[float, float] = (0.05, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    key: str = 'image'

    def __call__(self, batch: Tree, rng: ExampleRng) -> Tree:
        """Returns the batch with the field decoded and cut out."""
        files = get_field(batch, self.key)
        area = self.area[0] + rng.uniform() * (self.area[1] - self.area[0])
        low, high = np.log(self.ratio)
        ratio = np.exp(low + rng.uniform() * (high - low))
        place = rng.uniform((2,))
        images = np.empty((len(files), self.size, self.size, 3), np.uint8)
        for row, content in enumerate(files.tolist()):
            image = decode(content, self.key)
            # A rectangle that would not fit is as wide or as high as the image.
            width = min(np.sqrt(area[row] * ratio[row] * image.width * image.height), image.width)
            height = min(np.sqrt(area[row] / ratio[row] * image.width * image.height), image.height)
            left, top = place[row] * (image.width - width, image.height - height)
            images[row] = _cut(image, (left, top, left + width, top + height), self.size)
        return with_field(batch, self.key, images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """Cuts out the square in the middle of each image and resizes it, for evaluation.

    Attributes:
        size: height and width of the result.
        part: side of the square, as a part of the shorter side of the image.
        key: the field.
    """

    size: int
    part: float = 0.875
    key: str = 'image'

    def __call__(self, batch: Tree) -> Tree:
        """Returns the batch with the field decoded and cut out."""
        files = get_field(batch, self.key)
        images = np.empty((len(files), self.size, self.size, 3), np.uint8)
        for row, content in enumerate(files.tolist()):
            image = decode(content, self.key)
            side = self.part * min(image.width, image.height)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            images[row] = _cut(image, (left, top, left + side, top + side), self.size)
        return with_field(batch, self.key, images)


def decode(content: Any, key: str) -> Any:
    """Returns the Pillow image of a file, in RGB.

    Args:
        content: bytes of the file.
        key: the field that it is from, for messages.

    Raises:
        ValueError: if it is not the content of an image file.
    """
    from PIL import Image

    if not isinstance(content, bytes):
        raise ValueError(
            f'{key!r}: expected the bytes of an image file, got {type(content).__name__}; with '
            f'trainer.data.tfds:TFDS, set encoded=({key!r},)'
        )
    try:
        return Image.open(io.BytesIO(content)).convert('RGB')
    except OSError as error:
        raise ValueError(f'{key!r}: Pillow cannot decode an image file: {error}') from error


def _cut(image: Any, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Returns a part of an image, (left, top, right, bottom) in pixels, resized."""
    from PIL import Image

    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
