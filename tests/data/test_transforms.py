# SPDX-License-Identifier: Apache-2.0
"""The bundled transforms, and how transforms are applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trainer.data.rng import ExampleRng
from trainer.data.transforms import (
    Binarize,
    Keep,
    Normalize,
    OneHot,
    PerExample,
    RandomCrop,
    RandomFlip,
    Rename,
    ToFloat,
    apply,
)


def rng(n: int, stream: int = 0) -> ExampleRng:
    return ExampleRng(0, stream, np.zeros(n, np.int64), np.arange(n))


def test_to_float_and_normalize() -> None:
    batch = {'image': np.array([[0, 255]], np.uint8), 'label': np.array([1])}
    scaled = ToFloat()(batch)['image']
    assert scaled.dtype == np.float32
    assert scaled.tolist() == [[0.0, 1.0]]
    assert Normalize(mean=(0.0, 155.0), std=10.0)(batch)['image'].tolist() == [[0.0, 10.0]]


def test_fields() -> None:
    batch: dict[str, np.ndarray] = {'image': np.zeros(2), 'label': np.array([2, 0])}
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
    turned = RandomFlip(axis='height')({'image': images}, rng(300))['image']
    assert {x.tobytes() for x in turned} == {images[0].tobytes(), images[0][::-1].tobytes()}
    with pytest.raises(ValueError, match="axis: expected 'width' or 'height', got 'depth'"):
        RandomFlip(axis='depth')  # type: ignore[arg-type]


def test_to_float_of_another_field() -> None:
    batch: dict[str, np.ndarray] = {
        'audio': np.array([2, -4], np.int16),
        'image': np.array([255], np.uint8),
    }
    scaled = ToFloat(key='audio', scale=0.5, dtype='float16')(batch)
    assert scaled['audio'].dtype == np.float16
    assert scaled['audio'].tolist() == [1, -2]
    assert scaled['image'] is batch['image']


def test_to_float_of_every_byte() -> None:
    scaled = ToFloat()({'image': np.arange(256, dtype=np.uint8)})['image']
    np.testing.assert_allclose(scaled, np.arange(256) / 255, rtol=1e-6)


def test_normalize_each_channel() -> None:
    images = np.array([[[[10, 20, 30]]]], np.uint8)
    result = Normalize(mean=(0, 10, 50), std=(1, 2, 4))({'image': images})['image']
    assert result.dtype == np.float32
    assert result.tolist() == [[[[10, 5, -5]]]]


def test_one_hot_dtype_and_range() -> None:
    encoded = OneHot(num_classes=3, key='y')({'y': np.array([1], np.int32)})['y']
    assert encoded.dtype == np.float32
    with pytest.raises(IndexError):
        OneHot(num_classes=3)({'label': np.array([3])})


def test_missing_fields_are_named() -> None:
    with pytest.raises(KeyError, match='mask'):
        Keep(keys=('mask',))({'image': np.zeros(2)})
    with pytest.raises(KeyError, match='image'):
        ToFloat()({'label': np.zeros(2)})


def test_transforms_do_not_change_their_input() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1)
    batch = {'image': pixels.copy(), 'label': np.array([0, 1])}
    ToFloat()(batch)
    Normalize(mean=1.0, std=2.0)(batch)
    OneHot(num_classes=2)(batch)
    Rename(names={'image': 'x'})(batch)
    RandomCrop(padding=1)(batch, rng(2))
    RandomFlip()(batch, rng(2))
    assert list(batch) == ['image', 'label']
    np.testing.assert_array_equal(batch['image'], pixels)
    assert batch['label'].tolist() == [0, 1]


def test_crop_without_padding_changes_nothing() -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1)
    np.testing.assert_array_equal(RandomCrop(padding=0)({'image': images}, rng(2))['image'], images)


def test_flip_is_fair_and_keeps_the_dtype() -> None:
    images = np.tile(np.array([1, 2], np.uint8).reshape(1, 1, 2, 1), (10_000, 1, 1, 1))
    flipped = RandomFlip()({'image': images}, rng(10_000))['image']
    assert flipped.dtype == np.uint8
    assert (flipped[:, 0, 0, 0] == 2).mean() == pytest.approx(0.5, abs=0.03)


def test_per_example_without_rng() -> None:
    def add_sum(example: dict) -> dict:
        assert example['x'].shape == (2,)
        return {'sum': example['x'].sum(), 'x': example['x'][::-1]}

    batch = PerExample(fn=add_sum)({'x': np.array([[1, 2], [3, 4], [5, 6]])}, rng(3))
    assert batch['sum'].tolist() == [3, 7, 11]
    assert batch['x'].tolist() == [[2, 1], [4, 3], [6, 5]]


def test_per_example_with_rng() -> None:
    def add_noise(example: dict, rng: np.random.Generator) -> dict:
        return {'x': example['x'], 'noise': rng.random(2)}

    run = PerExample(fn=add_noise)
    noise = run({'x': np.arange(5)}, rng(5))['noise']
    assert len(np.unique(noise)) == 10
    np.testing.assert_array_equal(run({'x': np.arange(5)}, rng(5))['noise'], noise)
    # The generator belongs to the example and not to its row.
    mixed = ExampleRng(0, 0, np.zeros(2, np.int64), np.array([4, 1]))
    np.testing.assert_array_equal(run({'x': np.arange(2)}, mixed)['noise'], noise[[4, 1]])
    assert (run({'x': np.arange(5)}, rng(5, stream=1))['noise'] != noise).all()


def run_all(
    *transforms: Callable[..., dict], ids: list[int], epoch: int = 0, seed: int = 0
) -> dict:
    pixels = np.random.default_rng(0).integers(1, 256, (50, 8, 8, 1)).astype(np.uint8)
    rows = np.asarray(ids)
    batch = {'image': pixels[rows]}
    epochs = np.full(len(rows), epoch)
    return apply(transforms, batch, seed=seed, epochs=epochs, ids=rows)


def test_an_example_is_cropped_the_same_in_any_batch() -> None:
    transforms = (RandomCrop(padding=3), RandomFlip())
    everything = run_all(*transforms, ids=list(range(50)))['image']
    for ids in ([7], [49, 7, 0], list(range(49, -1, -1)), [7, 7]):
        np.testing.assert_array_equal(run_all(*transforms, ids=ids)['image'], everything[ids])


def test_draws_depend_on_epoch_and_seed() -> None:
    ids = list(range(50))
    first = run_all(RandomCrop(padding=3), ids=ids)['image']
    for other in ({'epoch': 1}, {'seed': 1}):
        changed = run_all(RandomCrop(padding=3), ids=ids, **other)['image']
        # One of 49 shifts is drawn again by chance now and then.
        assert (changed != first).any(axis=(1, 2, 3)).sum() > 40


def test_two_transforms_in_a_row_draw_different_numbers() -> None:
    def first(batch: dict, rng: ExampleRng) -> dict:
        return {**batch, 'first': rng.uniform()}

    def second(batch: dict, rng: ExampleRng) -> dict:
        return {**batch, 'second': rng.uniform(), 'third': rng.uniform()}

    batch = run_all(first, second, ids=list(range(50)))
    draws = np.stack([batch['first'], batch['second'], batch['third']])
    assert len(np.unique(draws)) == 150


def test_transforms_run_in_order() -> None:
    batch = run_all(ToFloat(scale=1.0), Normalize(mean=0.0, std=2.0), ids=[3])
    raw = run_all(ids=[3])['image']
    np.testing.assert_array_equal(batch['image'], raw / np.float32(2))


@pytest.mark.parametrize('random', [False, True])
def test_an_exception_names_the_transform(random: bool) -> None:
    def plain(batch: dict) -> dict:
        raise OverflowError('too much')

    def drawing(batch: dict, rng: ExampleRng) -> dict:
        raise OverflowError('too much')

    with pytest.raises(OverflowError, match='too much') as error:
        run_all(ToFloat(), drawing if random else plain, ids=[0])
    (note,) = error.value.__notes__
    assert note.startswith('in transforms[1] = ')
    assert ('drawing' if random else 'plain') in note


def test_an_exception_of_a_bundled_transform_shows_its_arguments() -> None:
    with pytest.raises(KeyError) as error:
        run_all(Normalize(key='sound', mean=0.0, std=1.0), ids=[0])
    assert error.value.__notes__ == ["in transforms[0] = Normalize(key='sound', mean=0.0, std=1.0)"]


@pytest.mark.parametrize(
    ('wrong', 'kind', 'message'),
    [
        (lambda batch: None, TypeError, 'must return a dict of arrays, got .*NoneType'),
        (lambda batch: {'image': [1, 2]}, TypeError, "'image' must be an array.*list"),
        (lambda batch: {'image': np.float32(1)}, TypeError, "'image' must be an array"),
        (lambda batch: {'image': np.zeros((1, 4))}, ValueError, 'must keep the number of rows'),
        (lambda batch: {'image': np.array(1)}, ValueError, r'has shape \(\) .* of 2 rows'),
    ],
)
def test_invalid_results_of_transforms_are_refused(
    wrong: Callable[[dict], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as error:
        run_all(ToFloat(), wrong, ids=[0, 1])
    assert error.value.__notes__[0].startswith('in transforms[1] = ')


def test_binarize_draws_with_the_grey_values() -> None:
    grey = np.broadcast_to(np.array([0, 64, 128, 255], np.uint8), (4000, 4))
    drawn = Binarize()({'image': grey}, rng(4000))['image']
    assert drawn.dtype == np.uint8 and set(np.unique(drawn)) == {0, 1}
    shares = drawn.mean(0)
    assert (shares[0], shares[3]) == (0, 1)
    np.testing.assert_allclose(shares, np.array([0, 64, 128, 255]) / 255, atol=0.03)


def test_binarize_draws_again_in_each_epoch_or_once() -> None:
    batch: dict[str, np.ndarray] = {'image': np.full((9, 8, 8, 1), 128, np.uint8)}

    def draw(transform: Binarize, epoch: int) -> np.ndarray:
        return transform(batch, ExampleRng(0, 0, np.full(9, epoch), np.arange(9)))['image']

    first = draw(Binarize(), 0)
    assert (draw(Binarize(), 1) != first).any()
    for epoch in (0, 1):
        np.testing.assert_array_equal(draw(Binarize(once=True), epoch), first)


def test_binarize_takes_bytes() -> None:
    with pytest.raises(ValueError, match="'image' is float32; expected uint8, values from 0 to 25"):
        Binarize()({'image': np.zeros((1, 2), np.float32)}, rng(1))
