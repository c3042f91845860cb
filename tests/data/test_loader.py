# SPDX-License-Identifier: Apache-2.0
"""Batches as a pure function of position, whatever the block; evaluation covers everything once."""

from __future__ import annotations

import gzip
import pathlib
import shutil

import numpy as np
import pytest

from data.digest import DataDigest
from data.loader import EvalLoader, TrainLoader
from data.mnist import MNIST
from data.order import PADDING
from data.sources import ArraySource, RandomAccessSource
from data.transforms import PerExample, RandomCrop, RandomFlip, ToFloat


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


def test_labels_travel_with_their_images() -> None:
    block = TrainLoader(source=images(), batch_size=4).block(0, 5)
    np.testing.assert_array_equal(block.arrays['label'], block.ids)


def test_padding_is_zeros_of_the_same_dtype_and_masked() -> None:
    block = TrainLoader(source=images(), batch_size=4, remainder='pad').block(2, 1)
    assert block.arrays['_mask'].tolist() == [[True, True, False, False]]
    assert block.arrays['image'].dtype == np.uint8
    assert not block.arrays['image'][0, 2:].any()


def test_repeat_batch() -> None:
    loader = TrainLoader(source=images(), batch_size=4, repeat_batch=2)
    ids = loader.block(0, 6).ids
    np.testing.assert_array_equal(ids[:2], ids[2:4])
    np.testing.assert_array_equal(ids[:2], ids[4:])


def test_spec_is_that_of_the_batches() -> None:
    loader = TrainLoader(source=images(), batch_size=4, transforms=RANDOM)
    arrays = loader.block(0, 1).arrays
    assert {k: (s.shape, s.dtype) for k, s in loader.spec.items()} == {
        k: (x.shape[1:], x.dtype) for k, x in arrays.items()
    }


@pytest.mark.parametrize(('n', 'batch', 'rows'), [(10, 4, 4), (10, 4, 8), (1, 8, 8), (8, 8, 8)])
def test_evaluation_covers_every_example_once(n: int, batch: int, rows: int) -> None:
    loader = EvalLoader(source=images(n), batch_size=batch, padded_to=rows)
    block = loader.block(0, loader.num_batches)
    assert block.arrays['_mask'].shape == (loader.num_batches, rows)
    assert block.ids[block.ids != PADDING].tolist() == list(range(n))
    np.testing.assert_array_equal(block.arrays['_mask'], block.ids != PADDING)


def test_randomness_belongs_to_the_example() -> None:
    """The same example of the same epoch is cropped alike in any batch; in another epoch not."""
    small = TrainLoader(source=images(), batch_size=2, transforms=RANDOM, seed=1).block(0, 10)
    large = TrainLoader(source=images(), batch_size=5, transforms=RANDOM, seed=1).block(0, 4)

    def by_epoch(block: object, epoch: int) -> np.ndarray:
        ids = block.ids.ravel()[10 * epoch : 10 * epoch + 10]
        pixels = block.arrays['image'].reshape(20, -1)[10 * epoch : 10 * epoch + 10]
        return pixels[np.argsort(ids)]

    np.testing.assert_array_equal(by_epoch(small, 0), by_epoch(large, 0))
    np.testing.assert_array_equal(by_epoch(small, 1), by_epoch(large, 1))
    assert (by_epoch(small, 0) != by_epoch(small, 1)).any()


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


def test_digest_is_of_order_and_content_not_of_blocks() -> None:
    loader = TrainLoader(source=images(), batch_size=4)
    ids = loader.block(0, 8).ids

    def digest(*parts: tuple[int, np.ndarray]) -> str:
        total = DataDigest()
        for start, some in parts:
            total.add(start, some)
        return total.value

    whole = digest((0, ids))
    assert digest((3, ids[3:]), (0, ids[:3])) == whole
    assert digest((0, ids[::-1])) != whole
    assert digest((0, ids[:, ::-1])) != whole
    assert digest((0, ids[:7])) != whole
    again = DataDigest()
    again.restore(digest((0, ids[:5])))
    again.add(5, ids[5:])
    assert again.value == whole


def test_random_access_source() -> None:
    items = [{'x': np.float32(i), 'y': [i, i]} for i in range(5)]
    source = RandomAccessSource(items)
    batch = source.gather(np.array([3, 1]))
    assert batch['x'].tolist() == [3, 1]
    assert batch['y'].tolist() == [[3, 3], [1, 1]]
    assert source.spec['y'].shape == (2,)


def test_mnist() -> None:
    train, test = MNIST('train'), MNIST('test')
    assert (len(train), len(test)) == (60_000, 10_000)
    labels = test.gather(np.arange(10_000))['label']
    assert (labels == 0).sum() == 980
    assert labels[:3].tolist() == [7, 2, 1]
    assert train.gather(np.array([0]))['label'].tolist() == [5]


def test_a_damaged_mnist_file_is_named(tmp_path: pathlib.Path) -> None:
    import data.mnist

    for path in pathlib.Path(data.mnist.__file__).parent.glob('t10k*.gz'):
        shutil.copy(path, tmp_path)
    labels = tmp_path / 't10k-labels-idx1-ubyte.gz'
    content = bytearray(gzip.decompress(labels.read_bytes()))
    content[100] ^= 1
    labels.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(ValueError, match=r't10k-labels-idx1-ubyte.* is damaged'):
        MNIST('test', directory=str(tmp_path))
    labels.write_bytes(labels.read_bytes()[:50])
    with pytest.raises(ValueError, match=r't10k-labels-idx1-ubyte.* cannot be read'):
        MNIST('test', directory=str(tmp_path))
