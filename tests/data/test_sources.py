# SPDX-License-Identifier: Apache-2.0
"""Sources: arrays in memory, and any object whose items are dicts."""

from __future__ import annotations

import numpy as np
import pytest

from data.loader import TrainLoader
from data.sources import ArraySource, ArraySpec, RandomAccessSource


def test_array_source() -> None:
    source = ArraySource({'x': np.arange(10), 'y': np.zeros((10, 2), np.int8)}, limit=3)
    assert len(source) == 3
    assert source.spec['y'] == ArraySpec((2,), np.dtype('int8'))
    assert source.gather(np.array([2, 0, 2]))['x'].tolist() == [2, 0, 2]
    with pytest.raises(IndexError):
        source.gather(np.array([3]))


def test_random_access_source() -> None:
    items = [{'x': np.float32(i), 'y': [i, i]} for i in range(5)]
    source = RandomAccessSource(items)
    batch = source.gather(np.array([3, 1]))
    assert batch['x'].tolist() == [3, 1]
    assert batch['y'].tolist() == [[3, 3], [1, 1]]
    assert source.spec['y'].shape == (2,)


def test_items_of_other_shapes_or_types() -> None:
    items = [{'x': np.zeros((2, 3))}, {'x': np.zeros((3, 2))}, {'x': np.zeros((2, 3), np.float32)}]
    source = RandomAccessSource(items)
    with pytest.raises(
        ValueError, match=r"'x' of example 1 is float64 \(3, 2\), of example 0 it is"
    ):
        source.gather(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"'x' of example 2 is float32.* resize, crop or pad"):
        source.gather(np.array([2]))


def test_texts_may_have_any_length() -> None:
    source = RandomAccessSource([{'text': b'a'}, {'text': b'longer'}])
    assert source.gather(np.array([1, 0]))['text'].tolist() == [b'longer', b'a']


def test_items_are_read_many_at_once_where_they_can_be() -> None:
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
    block = TrainLoader(source=RandomAccessSource(items), batch_size=4).block(0, 3)
    np.testing.assert_array_equal(block.arrays['x'], block.ids)
    assert items.reads == [block.ids.ravel().tolist()]


def test_sources_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"one positive length; got \{'x': 2, 'y': 3\}"):
        ArraySource({'x': np.zeros(2), 'y': np.zeros(3)})
    with pytest.raises(ValueError, match='one positive length'):
        ArraySource({'x': np.zeros(0)})
    with pytest.raises(ValueError, match='empty'):
        RandomAccessSource([])
    for limit in (0, -3):
        with pytest.raises(ValueError, match=f'limit: {limit} examples; expected a positive'):
            ArraySource({'x': np.zeros(5)}, limit=limit)
