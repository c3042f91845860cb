# SPDX-License-Identifier: Apache-2.0
"""RandAugment (Cubuk et al., 2019): a few random operations, all of one strength, on each image.

An operation takes uint8 images (n, height, width, channels) and strengths, float64 (n, 1, 1, 1)
from -1 to 1: the larger the absolute value, the larger the change. All operations but the
movements give the same values as Pillow, up to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from .nested import Tree, get_field, with_field
from .rng import ExampleRng

# Changes of the largest strength, as in the original work.
_DEGREES = 30.0
_SHEAR = 0.3
_SHIFT = 0.45  # Of the height or the width.
_BLEND = 0.9  # Factors are from 0.1 to 1.9.
_BITS = 4

# Transforms a batch: images, strengths and the value of new pixels, to images.
Operation = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
# Returns the inverse movement of a strength: a matrix and a shift in parts of the image, for (y, x)
# relative to the center.
Movement = Callable[[float], tuple[tuple[tuple[float, float], tuple[float, float]], np.ndarray]]


def _identity(images: np.ndarray, strength: np.ndarray, fill: int) -> np.ndarray:
    return images


def _auto_contrast(images: np.ndarray, strength: np.ndarray, fill: int) -> np.ndarray:
    """Stretches each channel to 0..255."""
    low = images.min(axis=(1, 2), keepdims=True).astype(np.float64)
    high = images.max(axis=(1, 2), keepdims=True)
    scale = 255 / np.maximum(high - low, 1)
    # A channel of one value stays.
    return np.where(high > low, _to_bytes(images * scale - low * scale), images)


def _equalize(images: np.ndarray, strength: np.ndarray, fill: int) -> np.ndarray:
    """Makes the values of each channel about equally frequent."""
    n, height, width, channels = images.shape
    # Each image and channel has 256 bins of its own in one histogram.
    first_bin = 256 * np.arange(n * channels).reshape(n, 1, 1, channels)
    bins = images + first_bin
    counts = np.bincount(bins.ravel(), minlength=256 * n * channels).reshape(-1, 256)
    highest = 255 - (counts[:, ::-1] > 0).argmax(axis=1)[:, None]
    step = (height * width - np.take_along_axis(counts, highest, axis=1)) // 255
    below = counts.cumsum(axis=1) - counts
    table = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    # Too few pixels besides those of the highest value: nothing changes.
    table = np.where(step > 0, table, np.arange(256))
    return table.astype(np.uint8).ravel()[bins]


def _posterize(images: np.ndarray, strength: np.ndarray, fill: int) -> np.ndarray:
    """Sets the lowest bits to zero."""
    bits = np.rint(_BITS * np.abs(strength)).astype(np.uint8)
    return images >> bits << bits


def _solarize(images: np.ndarray, strength: np.ndarray, fill: int) -> np.ndarray:
    """Inverts the values from a threshold on; at full strength all."""
    threshold = 256 * (1 - np.abs(strength))
    return np.where(images < threshold, images, 255 - images)


def _color(images: np.ndarray, strength: np.ndarray, fill: int) -> np.ndarray:
    return _blend(_to_grey(images), images, strength)


def _contrast(images: np.ndarray, strength: np.ndarray, fill: int) -> np.ndarray:
    mean = _to_grey(images).mean(axis=(1, 2, 3), keepdims=True)
    return _blend(np.rint(mean), images, strength)


def _brightness(images: np.ndarray, strength: np.ndarray, fill: int) -> np.ndarray:
    return _blend(np.zeros(()), images, strength)


def _sharpness(images: np.ndarray, strength: np.ndarray, fill: int) -> np.ndarray:
    """Moves away from a smoothed image, or towards it; the border stays."""
    smooth = images.astype(np.float64)
    height, width = images.shape[1:3]
    if min(height, width) < 3:
        return images
    views = [images[:, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    total = np.sum(views, axis=0, dtype=np.float64)
    # The middle counts five times as much as each of its eight neighbors.
    smooth[:, 1:-1, 1:-1] = np.rint((total + 4.0 * views[4]) / 13)
    return _blend(smooth, images, strength)


def _blend(other: np.ndarray, images: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Moves images away from others, or for a negative strength towards them."""
    return _to_bytes(other + (1 + _BLEND * strength) * (images - other))


def _to_grey(images: np.ndarray) -> np.ndarray:
    """Returns the brightness, float64 (n, height, width, 1)."""
    if images.shape[-1] != 3:
        return images.mean(axis=-1, keepdims=True)
    return np.rint(images @ np.array([[0.299], [0.587], [0.114]]))


def _to_bytes(values: np.ndarray) -> np.ndarray:
    # Pillow truncates, too.
    return np.clip(values, 0, 255).astype(np.uint8)


def _move(movement: Movement) -> Operation:
    """Returns the operation that moves pixels; each new one is its nearest old one, or `fill`."""

    def operation(images: np.ndarray, strength: np.ndarray, fill: int) -> np.ndarray:
        height, width = images.shape[1:3]
        center = np.array([height - 1, width - 1]) / 2
        grid = np.moveaxis(np.mgrid[:height, :width], 0, -1) - center
        moved = np.full_like(images, fill)
        for row, value in enumerate(strength.ravel().tolist()):
            matrix, shift = movement(value)
            at = grid @ np.transpose(matrix) + center + np.multiply(shift, (height, width))
            y, x = np.rint(at).astype(np.int64).transpose(2, 0, 1)
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            moved[row, inside] = images[row, y[inside], x[inside]]
        return moved

    return operation


_HERE = np.zeros(2)
_UPRIGHT = ((1.0, 0.0), (0.0, 1.0))


def _rotation(
    strength: float,
) -> tuple[tuple[tuple[float, float], tuple[float, float]], np.ndarray]:
    angle = np.deg2rad(_DEGREES * strength)
    return ((np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))), _HERE


OPERATIONS: dict[str, Operation] = {
    'identity': _identity,
    'auto_contrast': _auto_contrast,
    'equalize': _equalize,
    'rotate': _move(_rotation),
    'solarize': _solarize,
    'color': _color,
    'posterize': _posterize,
    'contrast': _contrast,
    'brightness': _brightness,
    'sharpness': _sharpness,
    'shear_x': _move(lambda s: (((1.0, 0.0), (_SHEAR * s, 1.0)), _HERE)),
    'shear_y': _move(lambda s: (((1.0, _SHEAR * s), (0.0, 1.0)), _HERE)),
    'shift_x': _move(lambda s: (_UPRIGHT, np.array([0.0, _SHIFT * s]))),
    'shift_y': _move(lambda s: (_UPRIGHT, np.array([_SHIFT * s, 0.0]))),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Applies random operations to each image, uint8 (height, width, channels).

    Each operation is drawn from `operations`, also repeatedly. Those with two directions (rotate,
    shear, shift; darker or brighter and the like) draw one of them.

    Attributes:
        layers: number of operations for each image.
        magnitude: strength of all operations, from 0 to 10.
        operations: names of those to draw from; by default all 14 of the original work: identity,
            auto_contrast, equalize, rotate, solarize, color, posterize, contrast, brightness,
            sharpness, shear_x, shear_y, shift_x and shift_y.
        fill: value of pixels that move in.
        key: the field.
    """

    layers: int = 2
    magnitude: float = 10.0
    operations: tuple[str, ...] = tuple(OPERATIONS)
    fill: int = 128
    key: str = 'image'

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ValueError(f'layers: {self.layers}; expected 0 or more')
        if not 0 <= self.magnitude <= 10:
            raise ValueError(f'magnitude: {self.magnitude}; expected a number from 0 to 10')
        if not 0 <= self.fill <= 255:
            raise ValueError(f'fill: {self.fill}; expected a number from 0 to 255')
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown or not self.operations:
            raise ValueError(f'operations: got {unknown}; expected some of {", ".join(OPERATIONS)}')

    def __call__(self, batch: Tree, rng: ExampleRng) -> Tree:
        """Returns the batch with the field augmented.

        Raises:
            ValueError: if the field is not uint8 (n, height, width, channels).
        """
        images = get_field(batch, self.key)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f'{self.key!r} is {images.dtype} {images.shape[1:]}; RandAugment needs uint8 '
                '(height, width, channels), so put it before ToFloat and Normalize'
            )
        chosen = rng.integers(0, len(self.operations), (self.layers,))
        sign = np.where(rng.uniform((self.layers,)) < 0.5, -1.0, 1.0)
        strength = sign[..., None, None, None] * self.magnitude / 10
        images = images.copy()
        for layer in range(self.layers):
            for index, name in enumerate(self.operations):
                # All images with this operation at once.
                rows = np.flatnonzero(chosen[:, layer] == index)
                if len(rows):
                    changed = OPERATIONS[name](images[rows], strength[rows, layer], self.fill)
                    images[rows] = changed
        return with_field(batch, self.key, images)
