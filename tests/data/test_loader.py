# SPDX-License-Identifier: Apache-2.0
"""Batches are a pure function of the position; an evaluation reads every example once."""

from __future__ import annotations

import itertools
import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from trainer.data.loader import Block, EvalLoader, TrainLoader
from trainer.data.order import PADDING
from trainer.data.sources import ArraySource, ArraySpec, RandomAccessSource
from trainer.data.transforms import OneHot, PerExample, RandomCrop, RandomFlip, Rename, ToFloat


def images(n: int = 10) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 6, 5, 1)).astype(np.uint8)
    return ArraySource({'image': pixels, 'label': np.arange(n, dtype=np.int32)})


RANDOM = (RandomCrop(padding=2), RandomFlip(), ToFloat())


def test_block_size_never_changes_a_value() -> None:
    loader = TrainLoader(source=images(), batch_size=4, transforms=RANDOM, seed=3)
    whole = loader.block(0, 12)
    for start in range(12):
        one = loader.block(start, 1)
        np.testing.assert_array_equal(one.arrays['image'][0], whole.arrays['image'][start])
        np.testing.assert_array_equal(one.ids[0], whole.ids[start])
    half = loader.block(0, 12, rows=slice(2, 4))
    np.testing.assert_array_equal(half.arrays['image'], whole.arrays['image'][:, 2:4])


def test_labels_match_their_images() -> None:
    block = TrainLoader(source=images(), batch_size=4).block(0, 5)
    np.testing.assert_array_equal(block.arrays['label'], block.ids)


def test_padding_repeats_the_first_row_of_its_batch_and_is_masked() -> None:
    block = TrainLoader(source=images(), batch_size=4, remainder='pad').block(0, 6)
    assert block.arrays['_mask'][2].tolist() == [True, True, False, False]
    for step in (2, 5):
        first, *_, third, fourth = block.arrays['image'][step]
        assert first.any()
        np.testing.assert_array_equal(third, first)
        np.testing.assert_array_equal(fourth, first)
        assert block.ids[step, 2:].tolist() == [PADDING, PADDING]
    assert (block.arrays['image'][2, 2] != block.arrays['image'][5, 2]).any()


def test_repeat_batch() -> None:
    loader = TrainLoader(source=images(), batch_size=4, repeat_batch=2)
    ids = loader.block(0, 6).ids
    np.testing.assert_array_equal(ids[:2], ids[2:4])
    np.testing.assert_array_equal(ids[:2], ids[4:])


def test_the_spec_matches_the_batches() -> None:
    loader = TrainLoader(source=images(), batch_size=4, transforms=RANDOM)
    arrays = loader.block(0, 1).arrays
    assert {k: (s.shape, s.dtype) for k, s in loader.spec.items()} == {
        k: (x.shape[1:], x.dtype) for k, x in arrays.items()
    }


@pytest.mark.parametrize(('n', 'batch', 'rows'), [(10, 4, 4), (10, 4, 8), (1, 8, 8), (8, 8, 8)])
def test_an_evaluation_reads_every_example_once(n: int, batch: int, rows: int) -> None:
    loader = EvalLoader(source=images(n), batch_size=batch, padded_to=rows)
    block = loader.block(0, loader.num_batches)
    assert block.arrays['_mask'].shape == (loader.num_batches, rows)
    assert block.ids[block.ids != PADDING].tolist() == list(range(n))
    np.testing.assert_array_equal(block.arrays['_mask'], block.ids != PADDING)


@pytest.mark.parametrize('threads', [2, 3, 16])
def test_threads_of_an_evaluation(threads: int) -> None:
    """The batches are the same, padding included."""
    one, more = (
        EvalLoader(source=images(), batch_size=8, padded_to=9, transforms=RANDOM, threads=n)
        for n in (1, threads)
    )
    expected, found = one.block(0, 2), more.block(0, 2)
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert set(found.arrays) == set(expected.arrays)
    for name, x in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], x)


def test_threads_read_at_the_same_time() -> None:
    """Each waits for the other here; an error names its example."""
    both = threading.Barrier(2, timeout=60)

    def wait(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        both.wait()
        return batch

    def fail(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if 7 in batch['label']:
            raise OSError('no such file')
        return batch

    EvalLoader(source=images(), batch_size=10, transforms=(wait,), threads=2).block(0, 1)
    failing = EvalLoader(source=images(), batch_size=10, transforms=(fail,), threads=2)
    with pytest.raises(OSError, match='no such file') as caught:
        failing.block(0, 1)
    assert 'while reading example 7 of the source ArraySource' in caught.value.__notes__


def test_random_transforms_depend_on_the_example() -> None:
    """An example is cropped the same in any batch of an epoch, and differently in another epoch."""
    small = TrainLoader(source=images(), batch_size=2, transforms=RANDOM, seed=1).block(0, 10)
    large = TrainLoader(source=images(), batch_size=5, transforms=RANDOM, seed=1).block(0, 4)

    def pixels_of_epoch(block: Block, epoch: int) -> np.ndarray:
        ids = block.ids.ravel()[10 * epoch : 10 * epoch + 10]
        pixels = block.arrays['image'].reshape(20, -1)[10 * epoch : 10 * epoch + 10]
        return pixels[np.argsort(ids)]

    np.testing.assert_array_equal(pixels_of_epoch(small, 0), pixels_of_epoch(large, 0))
    np.testing.assert_array_equal(pixels_of_epoch(small, 1), pixels_of_epoch(large, 1))
    assert (pixels_of_epoch(small, 0) != pixels_of_epoch(small, 1)).any()


def test_transforms_of_one_example() -> None:
    def noisy(example: dict, rng: np.random.Generator) -> dict:
        return {'label': example['label'], 'noise': rng.normal()}

    loader = TrainLoader(source=images(), batch_size=5, transforms=(PerExample(fn=noisy),))
    noise = loader.block(0, 4).arrays['noise']
    assert len(np.unique(noise)) == 20
    np.testing.assert_array_equal(noise, loader.block(0, 4).arrays['noise'])


def test_a_failing_transform_is_named() -> None:
    def broken(batch: dict) -> dict:
        return {'x': batch['nothing']}

    with pytest.raises(KeyError) as error:
        TrainLoader(source=images(), batch_size=2, transforms=(ToFloat(), broken)).block(0, 1)
    assert 'in transforms[1]' in error.value.__notes__[0]
    assert any(frame.name == 'broken' for frame in error.traceback)


def test_blocks_can_start_anywhere() -> None:
    loader = TrainLoader(source=images(), batch_size=4, transforms=RANDOM, seed=2)
    first, tail = loader.block(0, 8), loader.block(5, 3)
    assert set(first.arrays) == set(tail.arrays) == {'image', 'label'}
    for name, x in tail.arrays.items():
        np.testing.assert_array_equal(x, first.arrays[name][5:])
    np.testing.assert_array_equal(tail.ids, first.ids[5:])


def noisy(example: dict, rng: np.random.Generator) -> dict:
    return {**example, 'noise': rng.normal(size=2)}


@pytest.mark.parametrize('remainder', ['carry', 'pad', 'drop'])
@pytest.mark.parametrize('repeat_batch', [None, 2])
@pytest.mark.parametrize('size', [1, 2, 5, 11])
def test_batches_do_not_depend_on_the_blocks(
    remainder: str, repeat_batch: int | None, size: int
) -> None:
    loader = TrainLoader(
        source=images(),
        batch_size=4,
        transforms=(*RANDOM, PerExample(fn=noisy)),
        remainder=remainder,
        repeat_batch=repeat_batch,
    )
    whole = loader.block(0, 11)
    assert len(np.unique(whole.arrays['image'])) > 2
    for start in range(0, 11, size):
        part = loader.block(start, min(size, 11 - start))
        for name, x in part.arrays.items():
            np.testing.assert_array_equal(x, whole.arrays[name][start : start + size])
        np.testing.assert_array_equal(part.ids, whole.ids[start : start + size])


@pytest.mark.parametrize('rows', [slice(1, 3), slice(0, 4, 2), np.array([3, 0])])
@pytest.mark.parametrize('remainder', ['carry', 'pad'])
def test_rows_selects_rows_of_the_global_batch(rows: slice | np.ndarray, remainder: str) -> None:
    loader = TrainLoader(source=images(), batch_size=4, transforms=RANDOM, remainder=remainder)
    whole, some = loader.block(1, 4), loader.block(1, 4, rows=rows)
    assert set(whole.arrays) == set(some.arrays)
    for name, x in some.arrays.items():
        np.testing.assert_array_equal(x, whole.arrays[name][:, rows])
    np.testing.assert_array_equal(some.ids, whole.ids[:, rows])


def items(n: int) -> RandomAccessSource:
    return RandomAccessSource([{'x': np.full(3, i + 1, np.int16)} for i in range(n)])


@pytest.mark.parametrize('transforms', [(), (PerExample(fn=noisy),)])
def test_rows_that_are_all_padding(transforms: tuple[PerExample, ...]) -> None:
    """A process whose rows are all padding still gets copies of real examples."""
    loader = TrainLoader(source=items(10), batch_size=4, remainder='pad', transforms=transforms)
    block = loader.block(2, 1, rows=slice(2, 4))
    expected = loader.block(2, 1).arrays
    assert set(block.arrays) == set(expected)
    for name, x in block.arrays.items():
        assert x.dtype == expected[name].dtype
        np.testing.assert_array_equal(x, expected[name][:, 2:])
        if name != '_mask':
            np.testing.assert_array_equal(x[0, 1], expected[name][0, 0])
    assert block.ids.tolist() == [[PADDING, PADDING]]


@pytest.mark.parametrize('dtype', ['uint8', 'int32', 'float32', 'float64', 'bool'])
def test_padding_keeps_the_dtype(dtype: str) -> None:
    source = ArraySource({'x': (np.arange(20) % 3).reshape(10, 2).astype(dtype)})
    for loader in (
        TrainLoader(source=source, batch_size=4, remainder='pad', shuffle=False),
        EvalLoader(source=source, batch_size=4),
    ):
        x = loader.block(0, 3).arrays['x']
        assert x.dtype == np.dtype(dtype)
        ids = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 8, 8]])
        np.testing.assert_array_equal(x, source.gather(ids.ravel())['x'].reshape(3, 4, 2))


def test_padding_is_transformed_once_for_each_padded_batch() -> None:
    sizes = []

    def plus_one(batch: dict) -> dict:
        sizes.append(len(batch['label']))
        return {'x': batch['label'] + 1}

    loader = EvalLoader(source=images(5), batch_size=4, transforms=(plus_one,))
    assert loader.block(0, 2).arrays['x'].tolist() == [[1, 2, 3, 4], [5, 5, 5, 5]]
    # Behind the end too: a process may have to go on while others still have examples.
    behind = loader.block(2, 2)
    assert behind.arrays['x'].tolist() == [[1] * 4] * 2
    assert not behind.arrays['_mask'].any()
    assert sizes == [6, 2]


def test_batches_have_a_mask_if_there_may_be_padding() -> None:
    for remainder, masked in [('carry', False), ('drop', False), ('pad', True)]:
        loader = TrainLoader(source=images(8), batch_size=4, remainder=remainder)
        assert ('_mask' in loader.block(0, 1).arrays) == masked
        assert ('_mask' in loader.spec) == masked
    assert loader.block(0, 2).arrays['_mask'].tolist() == [[True] * 4] * 2
    assert loader.spec['_mask'] == ArraySpec((4,), np.dtype(bool))


def test_repeated_batches_are_the_first_ones() -> None:
    def loader(repeat_batch: int | None) -> TrainLoader:
        return TrainLoader(
            source=images(), batch_size=4, transforms=RANDOM, repeat_batch=repeat_batch
        )

    plain = loader(None).block(0, 3).arrays['image']
    repeated = loader(3).block(7, 4).arrays['image']
    np.testing.assert_array_equal(repeated, plain[[1, 2, 0, 1]])
    assert (loader(None).block(3, 3).arrays['image'] != plain).any()


def test_steps_per_epoch() -> None:
    for remainder, expected in [('carry', Fraction(5, 2)), ('pad', 3), ('drop', 2)]:
        loader = TrainLoader(source=images(), batch_size=4, remainder=remainder)
        assert loader.steps_per_epoch == expected
        assert (loader.examples, loader.batch_size) == (10, 4)


def test_the_spec_after_transforms() -> None:
    transforms = (ToFloat(), Rename(names={'image': 'x'}), OneHot(num_classes=10))
    expected = {
        'x': ArraySpec((4, 6, 5, 1), np.dtype('float32')),
        'label': ArraySpec((4, 10), np.dtype('float32')),
    }
    assert TrainLoader(source=images(), batch_size=4, transforms=transforms).spec == expected
    expected = {k: ArraySpec((8, *s.shape[1:]), s.dtype) for k, s in expected.items()}
    expected['_mask'] = ArraySpec((8,), np.dtype(bool))
    loader = EvalLoader(source=images(), batch_size=4, transforms=transforms, padded_to=8)
    assert loader.spec == expected


def test_seed_and_shuffle() -> None:
    def ids(**options: Any) -> list[int]:
        loader = TrainLoader(source=images(), batch_size=5, **options)
        return loader.block(0, 2).ids.ravel().tolist()

    assert ids(shuffle=False) == list(range(10))
    assert ids(seed=0) == ids() != ids(seed=1)


@pytest.mark.parametrize('padded_to', [None, 520])
def test_an_evaluation_of_ten_thousand_in_batches_of_512(padded_to: int | None) -> None:
    source = ArraySource({'x': np.arange(10_000)})
    loader = EvalLoader(source=source, batch_size=512, padded_to=padded_to)
    assert (loader.num_batches, loader.examples) == (20, 10_000)
    seen = []
    for batch in range(20):
        arrays = loader.block(batch, 1).arrays
        x, mask = arrays['x'][0], arrays['_mask'][0]
        assert x.shape == mask.shape == (padded_to or 512,)
        assert mask.sum() == (512 if batch < 19 else 10_000 - 19 * 512)
        assert set(x[~mask]) <= {x[0]}
        seen += x[mask].tolist()
    assert seen == list(range(10_000))


def test_an_evaluation_of_one_example() -> None:
    loader = EvalLoader(source=items(1), batch_size=4, padded_to=6)
    block = loader.block(0, loader.num_batches)
    assert loader.num_batches == 1
    assert block.arrays['x'].tolist() == [[[1] * 3] * 6]
    assert block.arrays['_mask'].tolist() == [[True] + [False] * 5]


def test_padded_to_never_shrinks_a_batch() -> None:
    assert EvalLoader(source=images(), batch_size=4, padded_to=2).spec['label'].shape == (4,)


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match='repeat_batch: 0 batches; expected at least 1, or None'):
        TrainLoader(source=images(), batch_size=4, repeat_batch=0)
    with pytest.raises(ValueError, match='batch_size: 0 examples; expected a positive number'):
        EvalLoader(source=images(), batch_size=0)
    with pytest.raises(ValueError, match='threads: 0; expected a positive number, and 1 for a'):
        EvalLoader(source=images(), batch_size=4, threads=0)


@pytest.mark.parametrize('remainder', ['carry', 'pad', 'drop'])
def test_a_batch_larger_than_the_source(remainder: str) -> None:
    def loader() -> TrainLoader:
        return TrainLoader(source=images(3), batch_size=8, remainder=remainder, seed=4)

    if remainder == 'drop':
        with pytest.raises(
            ValueError, match=r"leaves no batch: 3 examples .* use 'carry' or 'pad'"
        ):
            loader()
        return
    block = loader().block(0, 3)
    if remainder == 'carry':
        ids = block.ids.ravel()
        assert all(sorted(ids[i : i + 3]) == [0, 1, 2] for i in range(0, 24, 3))
        np.testing.assert_array_equal(block.arrays['label'], block.ids)
    else:
        assert [sorted(ids) for ids in block.ids.tolist()] == [[PADDING] * 5 + [0, 1, 2]] * 3
        assert block.arrays['label'][:, 3:].tolist() == [[first] * 5 for first in block.ids[:, 0]]
    assert loader().steps_per_epoch == (Fraction(3, 8) if remainder == 'carry' else 1)


def test_the_name_of_the_mask_is_reserved() -> None:
    source = ArraySource({'_mask': np.ones(5, bool)})
    with pytest.raises(ValueError, match="field name '_mask' is reserved"):
        EvalLoader(source=source, batch_size=2).block(0, 1)
    with pytest.raises(ValueError, match="field name '_mask' is reserved"):
        TrainLoader(source=source, batch_size=2, remainder='pad').block(0, 1)


@pytest.mark.parametrize('sizes', [((0, 2), (3, 4)), ((0, 8), (3, 4)), ((0, 2), (1, 5), (3, 4))])
def test_batches_after_a_change_of_the_batch_size(sizes: Any) -> None:
    """Augmentation does not depend on earlier batch sizes; positions remain steps."""
    loader = TrainLoader(source=images(), batch_size=4, transforms=RANDOM, seed=3)
    after = loader.after(sizes)
    consumed = sum((stop - start) * size for (start, size), (stop, _) in itertools.pairwise(sizes))
    one = TrainLoader(source=images(), batch_size=1, transforms=RANDOM, seed=3)
    expected, found = one.block(consumed, 4 * 9), after.block(3, 9)
    for name, x in found.arrays.items():
        np.testing.assert_array_equal(x.reshape(36, *x.shape[2:]), expected.arrays[name][:, 0])
    np.testing.assert_array_equal(after.block(7, 2).ids, found.ids[4:6])
    assert (after.spec, after.steps_per_epoch) == (loader.spec, loader.steps_per_epoch)
    assert loader.marks == after.after(((0, 4),)).marks == ()
    np.testing.assert_array_equal(after.after(((0, 4),)).block(0, 5).ids, loader.block(0, 5).ids)


def test_first_is_the_first_example_of_the_source() -> None:
    for shuffle in (True, False):
        loader = TrainLoader(source=images(), batch_size=4, seed=3, shuffle=shuffle)
        assert loader.first['label'].tolist() == [0]
        assert loader.first['image'].shape == (1, 6, 5, 1)
        later = loader.after(((0, 2), (7, 4)))
        np.testing.assert_array_equal(later.first['image'], loader.first['image'])
