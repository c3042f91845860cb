# SPDX-License-Identifier: Apache-2.0
"""Decodes, crops and resizes one image with simplejpeg and OpenCV, the extra `[images]`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable

import numpy as np

# Top, left, height and width of a part of an image, in pixels.
Box = tuple[int, int, int, int]

_JPEG = b'\xff\xd8'


def check_installed() -> None:
    """Raises an ImportError that names the command, if a package of the extra is missing."""
    missing = [name for name in ('simplejpeg', 'cv2') if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'decoding images needs {" and ".join(missing)}: '
            "pip install 'jax-config-trainer[images]'"
        )


def random_box(
    height: int,
    width: int,
    draws: Iterable[np.ndarray],
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Returns a random part of an image, as for the Inception networks.

    Args:
        height: of the image.
        width: of the image.
        draws: four numbers in [0, 1) for each proposal: area, aspect ratio, and position.
        area: smallest and largest share of the image's area.
        ratio: smallest and largest quotient of width and height.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for a, b, top, left in draws:
        pixels = (area[0] + a * (area[1] - area[0])) * height * width
        aspect = math.exp(low + b * (high - low))
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    # No proposal fits into a very long image: the largest central part within the ratios.
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def central_box(height: int, width: int, share: float) -> Box:
    """Returns the central square whose side is this share of the image's shorter side."""
    side = max(1, round(min(height, width) * share))
    return (height - side) // 2, (width - side) // 2, side, side


def crop_and_resize(content: bytes, box: Callable[[int, int], Box], out: np.ndarray) -> None:
    """Decodes an image and writes a part of it, resized, into `out`.

    Args:
        content: of an image file.
        box: returns the part, for height and width of the image.
        out: uint8 (size, size, channels).

    Raises:
        ValueError: if the content is no image that can be decoded.
    """
    size, channels = out.shape[1], out.shape[2]
    decode = _decode_jpeg if content[:2] == _JPEG else _decode_other
    image, (top, left, height, width) = decode(content, box, size, channels)
    part = image[top : top + height, left : left + width]
    if part.shape == out.shape:
        out[:] = part
        return
    import cv2

    # Bilinear interpolation reads four pixels for each, so it is right as long as the image shrinks
    # to no less than half.
    shrinks = min(height, width) > 2 * size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(part, (size, size), interpolation=interpolation)
    out[:] = resized.reshape(out.shape)  # OpenCV returns grey images without the last dimension.


def _decode_jpeg(
    content: bytes, box: Callable[[int, int], Box], size: int, channels: int
) -> tuple[np.ndarray, Box]:
    """Returns the image, in a smaller size if its part shrinks by 2 or more, and the part."""
    import simplejpeg

    # Some encoders append bytes, of which the library complains if `strict`, as it does of a file
    # that was cut off. Only that is an error here.
    if b'\xff\xd9' not in content:
        raise ValueError('the JPEG file is truncated')
    try:
        full_height, full_width = map(int, simplejpeg.decode_jpeg_header(content, strict=False)[:2])
    except (ValueError, KeyError) as error:
        raise ValueError('the header of the JPEG file is damaged') from error
    top, left, height, width = box(full_height, full_width)
    # The decoder itself can compute a smaller image, which is faster than to resize it.
    scale = max(size / height, size / width)
    image = simplejpeg.decode_jpeg(
        content,
        'RGB' if channels == 3 else 'GRAY',
        fastdct=True,
        fastupsample=True,
        min_height=math.ceil(full_height * scale),
        min_width=math.ceil(full_width * scale),
        min_factor=2,
        strict=False,
    )
    y, x = image.shape[0] / full_height, image.shape[1] / full_width
    part = (int(top * y), int(left * x), max(1, round(height * y)), max(1, round(width * x)))
    return image, part


def _decode_other(
    content: bytes, box: Callable[[int, int], Box], size: int, channels: int
) -> tuple[np.ndarray, Box]:
    import cv2

    kind = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
    image = None
    if content:
        pixels = np.frombuffer(content, np.uint8)
        image = cv2.imdecode(pixels, kind | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise ValueError('not an image that OpenCV can decode')
    image = image.reshape(*image.shape[:2], channels)
    return image, box(*image.shape[:2])
