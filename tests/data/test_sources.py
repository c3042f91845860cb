# SPDX-License-Identifier: Apache-2.0
"""Sources: arrays in memory, and any object whose items are dicts."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from trainer.data.loader import TrainLoader
from trainer.data.sources import ArraySource, ArraySpec, RandomAccessSource


def test_array_source() -> None:
    source = ArraySource({'x': np.arange(10), 'y': np.zeros((10, 2), np.int8)}, limit=3)
    assert len(source) == 3
    assert source.spec['y'] == ArraySpec((2,), np.dtype('int8'))
    assert source.gather(np.array([2, 0, 2]))['x'].tolist() == [2, 0, 2]
    with pytest.raises(IndexError):
        source.gather(np.array([3]))


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    'held',
    [
        read_only(np.arange(20.0).reshape(10, 2)),
        np.frombuffer(np.arange(20.0).tobytes()).reshape(10, 2),
        np.asfortranarray(np.arange(20.0).reshape(10, 2)),
        np.arange(20.0).reshape(2, 10).T,
        np.arange(40.0).reshape(20, 2)[::-2],
        np.broadcast_to(np.arange(2.0), (10, 2)),
        np.arange(20.0).reshape(10, 2).astype('>f8'),
    ],
    ids=['read-only', 'frombuffer', 'fortran', 'transposed', 'strided', 'broadcast', 'big-endian'],
)
def test_any_kind_of_array(held: np.ndarray) -> None:
    """Batches are plain, writeable copies, never views of the source's memory."""
    source = ArraySource({'x': held})
    batch = source.gather(np.array([9, 0, 9]))['x']
    np.testing.assert_array_equal(batch, held[[9, 0, 9]])
    assert batch.flags.c_contiguous and batch.flags.writeable and batch.dtype.isnative
    assert source.spec['x'] == ArraySpec((2,), batch.dtype)
    assert not np.shares_memory(batch, held)
    loader = TrainLoader(source=source, batch_size=4, remainder='pad')
    np.testing.assert_array_equal(
        loader.block(0, 2).arrays['x'][0], held[loader.block(0, 1).ids[0]]
    )


def test_a_memory_map(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'x.npy'
    np.save(path, np.arange(20).reshape(10, 2))
    source = ArraySource({'x': np.load(path, mmap_mode='r')})
    assert source.gather(np.array([3]))['x'].tolist() == [[6, 7]]


def test_random_access_source() -> None:
    items = [{'x': np.float32(i), 'y': [i, i]} for i in range(5)]
    source = RandomAccessSource(items)
    batch = source.gather(np.array([3, 1]))
    assert batch['x'].tolist() == [3, 1]
    assert batch['y'].tolist() == [[3, 3], [1, 1]]
    assert source.spec['y'].shape == (2,)


def test_items_of_different_shapes_or_types_are_refused() -> None:
    items = [{'x': np.zeros((2, 3))}, {'x': np.zeros((3, 2))}, {'x': np.zeros((2, 3), np.float32)}]
    source = RandomAccessSource(items)
    with pytest.raises(
        ValueError, match=r"'x' of example 1 is float64 \(3, 2\), but in example 0 it is"
    ):
        source.gather(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"'x' of example 2 is float32.* resize, crop or pad"):
        source.gather(np.array([2]))


def test_texts_may_differ_in_length() -> None:
    source = RandomAccessSource([{'text': b'a'}, {'text': b'longer'}])
    assert source.gather(np.array([1, 0]))['text'].tolist() == [b'longer', b'a']


def test_getitems_is_used_if_it_exists() -> None:
    class Items:
        def __init__(self) -> None:
            self.reads: list[list[int]] = []

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> dict:
            return {'x': index}

        def __getitems__(self, indices: list[int]) -> list[dict]:
            self.reads.append(indices)
            return [self[i] for i in indices]

    items = Items()
    loader = TrainLoader(source=RandomAccessSource(items), batch_size=4)
    items.reads.clear()
    block = loader.block(0, 3)
    np.testing.assert_array_equal(block.arrays['x'], block.ids)
    assert items.reads == [block.ids.ravel().tolist()]


def test_invalid_sources_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the same positive length.*got \{'x': 2, 'y': 3\}"):
        ArraySource({'x': np.zeros(2), 'y': np.zeros(3)})
    with pytest.raises(ValueError, match='the same positive length'):
        ArraySource({'x': np.zeros(0)})
    with pytest.raises(ValueError, match=r"the same positive length.*got \{'x': None\}"):
        ArraySource({'x': np.array(3)})
    with pytest.raises(ValueError, match='empty'):
        RandomAccessSource([])
    for limit in (0, -3):
        with pytest.raises(ValueError, match=f'limit: {limit} examples; expected a positive'):
            ArraySource({'x': np.zeros(5)}, limit=limit)
