# SPDX-License-Identifier: Apache-2.0
"""RandAugment: operations equal to Pillow's, and numbers that depend on the example alone."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from trainer.data.mnist import MNIST
from trainer.data.rand_augment import OPERATIONS, RandAugment
from trainer.data.transforms import apply

PILImage = pytest.importorskip('PIL.Image')
from PIL import ImageEnhance, ImageOps  # noqa: E402

# Smooth colors with all values, and a noisy image with few.
Y, X = np.mgrid[:32, :24]
SMOOTH = np.stack([8 * Y, 10 * X, 255 - 4 * (X + Y)], axis=-1).astype('u1')
NOISE = np.random.default_rng(0).integers(60, 90, (32, 24, 3)).astype('u1')
IMAGES = np.stack([SMOOTH, NOISE])


def operate(name: str, strength: float, images: np.ndarray = IMAGES) -> np.ndarray:
    strengths = np.full((len(images), 1, 1, 1), strength)
    result = OPERATIONS[name](images, strengths, 7)
    assert (result.dtype, result.shape) == (np.uint8, images.shape)
    return result


def enhance(kind: Any) -> Any:
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


PILLOW = {
    'identity': lambda image, strength: image,
    'auto_contrast': lambda image, strength: ImageOps.autocontrast(image),
    'equalize': lambda image, strength: ImageOps.equalize(image),
    'posterize': lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    'solarize': lambda image, strength: ImageOps.solarize(image, 256 * (1 - abs(strength))),
    'color': enhance(ImageEnhance.Color),
    'contrast': enhance(ImageEnhance.Contrast),
    'brightness': enhance(ImageEnhance.Brightness),
    'sharpness': enhance(ImageEnhance.Sharpness),
}


@pytest.mark.parametrize('strength', [-1.0, -0.5, 0.0, 0.3, 1.0])
@pytest.mark.parametrize('name', PILLOW)
def test_operations_equal_pillow_s(name: str, strength: float) -> None:
    found = operate(name, strength)
    for mine, image in zip(found, IMAGES, strict=True):
        theirs = np.asarray(PILLOW[name](PILImage.fromarray(image), strength))
        # Pillow blends in float32, and from there on truncates.
        allowed = 1 if name in ('color', 'contrast', 'brightness', 'sharpness') else 0
        assert np.abs(mine.astype(int) - theirs).max() <= allowed


def test_grey_images_equal_pillow_s() -> None:
    grey = SMOOTH[..., :1]
    for name in ('auto_contrast', 'equalize', 'contrast'):
        theirs = np.asarray(PILLOW[name](PILImage.fromarray(grey[..., 0]), 0.5))
        mine = operate(name, 0.5, grey[None])[0, ..., 0]
        assert np.abs(mine.astype(int) - theirs).max() <= 1
    np.testing.assert_array_equal(operate('color', 1.0, grey[None])[0], grey)


@pytest.mark.parametrize('name', ['auto_contrast', 'equalize'])
def test_images_of_one_value_stay(name: str) -> None:
    plain = np.full((1, 4, 4, 1), 9, np.uint8)
    np.testing.assert_array_equal(operate(name, 1.0, plain), plain)


@pytest.mark.parametrize('name', [name for name in OPERATIONS if name not in PILLOW])
def test_movements_of_strength_zero_change_nothing(name: str) -> None:
    np.testing.assert_array_equal(operate(name, 0.0), IMAGES)


def test_shifts() -> None:
    """By whole pixels, with the fill value moving in."""
    images = IMAGES[:, :20, :20]
    left = operate('shift_x', 1.0, images)
    np.testing.assert_array_equal(left[:, :, :11], images[:, :, 9:])
    assert (left[:, :, 11:] == 7).all()
    down = operate('shift_y', -1.0, images)
    np.testing.assert_array_equal(down[:, 9:], images[:, :11])
    assert (down[:, :9] == 7).all()


def test_shears() -> None:
    """Rows move in proportion to their distance from the middle, and columns likewise."""
    image = np.tile(np.arange(21, dtype=np.uint8), (21, 1))[None, :, :, None]
    sheared = operate('shear_x', 1.0, image)[0, :, :, 0]
    for row in (0, 10, 20):
        by = round(0.3 * (row - 10))
        columns = np.arange(5, 16)
        np.testing.assert_array_equal(sheared[row, columns], columns + by)
    upright = operate('shear_y', 1.0, image.swapaxes(1, 2))[0, :, :, 0]
    np.testing.assert_array_equal(upright, sheared.T)


def test_rotations_equal_pillow_s() -> None:
    """Up to pixels whose nearest neighbor is a matter of rounding."""
    image = SMOOTH[:24]
    for strength in (-1.0, 0.5):
        theirs = PILImage.fromarray(image).rotate(30 * strength, fillcolor=(7, 7, 7))
        differ = (operate('rotate', strength, image[None])[0] != np.asarray(theirs)).any(axis=-1)
        assert differ.mean() < 0.02


def run(ids: list[int], epoch: int = 0, seed: int = 0, **options: Any) -> np.ndarray:
    rows = np.array(ids)
    images = MNIST('test').gather(rows)
    epochs = np.full(len(ids), epoch)
    transforms = (RandAugment(**options),)
    return apply(transforms, images, seed=seed, epochs=epochs, ids=rows)['image']


def test_an_image_is_augmented_the_same_in_any_batch() -> None:
    everything = run(list(range(60)))
    for ids in ([7], [49, 7, 0], [7, 7], list(range(59, -1, -1))):
        np.testing.assert_array_equal(run(ids), everything[ids])


def test_the_augmentation_never_changes() -> None:
    """A resumed run of another version must see the same images."""
    # Without the sine and the cosine, whose last bits depend on the machine.
    exact = tuple(name for name in OPERATIONS if name != 'rotate')
    images = run(list(range(40)), operations=exact)
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == 'ef99a268a1146a06'


def test_epochs_and_seeds_differ() -> None:
    ids = list(range(60))
    for other in ({'epoch': 1}, {'seed': 1}):
        assert (run(ids, **other) != run(ids)).any(axis=(1, 2, 3)).mean() > 0.6


def test_every_operation_is_drawn_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def note(name: str) -> Any:
        def operation(images: Any, strength: Any, fill: int) -> Any:
            seen.update((name, sign) for sign in np.sign(strength).ravel().tolist())
            return images

        return operation

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, note(name))
    run(list(range(200)), layers=1)
    assert seen == {(name, sign) for name in OPERATIONS for sign in (-1, 1)}


def test_no_layers_change_nothing() -> None:
    images = MNIST('test').gather(np.arange(5))['image']
    np.testing.assert_array_equal(run(list(range(5)), layers=0), images)
    np.testing.assert_array_equal(run(list(range(5)), operations=('identity',)), images)


def test_the_input_is_not_written_to() -> None:
    images = MNIST('test').gather(np.arange(30))
    before = images['image'].copy()
    epochs = np.zeros(30, np.int64)
    apply((RandAugment(),), images, seed=0, epochs=epochs, ids=np.arange(30))
    np.testing.assert_array_equal(images['image'], before)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'layers': -1}, 'layers: -1; expected 0 or more'),
        ({'magnitude': 11}, 'magnitude: 11; expected a number from 0 to 10'),
        ({'fill': 256}, 'fill: 256; expected a number from 0 to 255'),
        ({'operations': ('turn',)}, r"operations: got \['turn'\]; expected some of identity, "),
        ({'operations': ()}, r'operations: got \[\]; expected some of identity, '),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandAugment(**options)


def test_images_of_another_dtype_are_refused() -> None:
    batch = {'image': np.zeros((2, 4, 4, 1), np.float32)}
    with pytest.raises(ValueError, match=r'float32 \(4, 4, 1\); .* put it before ToFloat'):
        apply((RandAugment(),), batch, seed=0, epochs=np.zeros(2), ids=np.arange(2))
