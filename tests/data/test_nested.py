# SPDX-License-Identifier: Apache-2.0
"""Trees of arrays: walked, named, and changed at a path."""

from __future__ import annotations

import datetime
from typing import Any, NamedTuple

import numpy as np
import pytest

from data import nested, transforms
from data.grain_loader import GrainLoader
from data.loader import TrainLoader
from data.mixture import Mixture
from data.per_example import PerExample
from data.rng import ExampleRng
from data.sources import ArraySource, ArraySpec, RandomAccessSource
from data.stages import Filter, LongerThan, Map
from data.streaming import StreamLoader


class Graph(NamedTuple):
    nodes: Any
    edges: Any


X, Y = np.arange(3), np.ones(3)


def test_arrays_are_mapped_in_place() -> None:
    tree = {'pair': (X, Y), 'list': [X], 'graph': Graph(nodes=Y, edges=None), 'deep': {'x': X}}
    doubled = nested.map_arrays(lambda x, y: x + y, tree, tree)
    assert doubled['pair'][0].tolist() == [0, 2, 4]
    assert isinstance(doubled['graph'], Graph) and doubled['graph'].edges is None
    assert isinstance(doubled['list'], list) and isinstance(doubled['pair'], tuple)
    assert doubled['deep']['x'].tolist() == [0, 2, 4]
    names = ['pair/0', 'pair/1', 'list/0', 'graph/nodes', 'deep/x']
    assert list(nested.leaves_with_names(tree)) == names


@pytest.mark.parametrize(
    'value',
    [[1, 2], (1.5, np.float32(2)), [[1], [2]], [datetime.date(2026, 1, 1)], ['a', 'b'], (), 3],
)
def test_a_list_without_arrays_is_a_value(value: Any) -> None:
    assert not nested.is_node(value)
    assert nested.is_flat({'x': value})


@pytest.mark.parametrize('value', [[X], (1, X), [{'x': 1}], {}, None, Graph(1, 2), [None]])
def test_what_holds_arrays_is_a_node(value: Any) -> None:
    assert nested.is_node(value)


def test_an_example_of_two_numbers_is_a_tuple_of_two() -> None:
    assert nested.leaves_with_names((1, 2.5)) == {'0': 1, '1': 2.5}


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        ({'a': {'x': X}, 'b': (X, X)}, "'a' has the keys x, not x, y"),
        ({'a': {'x': X, 'y': X}, 'b': (X,)}, "'b' has 1 items, not 2"),
        ({'a': {'x': X, 'y': X}, 'b': [X, X]}, "'b' is a list, not a tuple"),
        ({'a': {'x': X, 'y': (X,)}, 'b': (X, X)}, "'a/y' is a tuple, not an array"),
        ({'a': {'x': X, 'y': X}, 'b': X}, "'b' is an array, not a tuple"),
        ({'b': X}, 'it has the keys b, not a, b'),
    ],
)
def test_a_difference_in_structure_is_named(other: Any, message: str) -> None:
    tree = {'a': {'x': X, 'y': X}, 'b': (X, X)}
    with pytest.raises(nested.StructureError, match=f'^{message}$') as error:
        nested.map_arrays(lambda *xs: xs, tree, tree, other)
    assert error.value.position == 1


def test_fields_are_read_and_replaced_by_path() -> None:
    tree = {'a': {'x': X}, 'pair': (X, [Y]), 'graph': Graph(X, Y), 'c/d': X}
    for path in ('a', 'a/x', 'pair/1/0', 'graph/edges', 'c/d'):
        assert nested.has_field(tree, path)
        changed = nested.with_field(tree, path, new := X + 1)
        assert nested.get_field(changed, path) is new
        assert nested.get_field(tree, path) is not changed
    assert isinstance(nested.with_field(tree, 'graph/edges', X)['graph'], Graph)
    assert nested.get_field(nested.with_field(tree, 'a/new', Y), 'a/new') is Y
    assert list(nested.with_field({'b': X, 'a': X}, 'b', Y)) == ['b', 'a']
    assert not nested.has_field(tree, 'a/y') and not nested.has_field(tree, 'pair/x')
    with pytest.raises(KeyError, match=r'a/y.*the batch has a/x, pair/0'):
        nested.get_field(tree, 'a/y')
    with pytest.raises(KeyError, match='a tuple has no such place'):
        nested.with_field(tree, 'pair/2', X)


def test_a_key_with_a_slash_is_a_field_beside_the_key_before_it() -> None:
    flat = {'a': X, 'a/x': Y}
    assert nested.get_field(flat, 'a/x') is Y
    assert nested.with_field(flat, 'a/x', 7) == {'a': X, 'a/x': 7}
    assert nested.with_field({'a': X}, 'a/x', 7) == {'a': X, 'a/x': 7}
    tree = {'a/b': {'c': X}, 'a': {'d': Y}}
    assert nested.get_field(tree, 'a/b/c') is X and nested.get_field(tree, 'a/d') is Y


def test_fields_are_kept_and_removed_by_path() -> None:
    tree = {'a': {'x': X, 'y': Y}, 'b': X, 'pair': (X, Y)}
    assert nested.keep_fields(tree, ('a/y', 'pair')).keys() == {'a', 'pair'}
    assert nested.keep_fields(tree, ('a/y',)) == {'a': {'y': Y}}
    assert nested.without_field(tree, 'a/x').keys() == {'a', 'b', 'pair'}
    assert nested.without_field(tree, 'a/x')['a'].keys() == {'y'}
    for change in (nested.without_field, lambda batch, path: nested.keep_fields(batch, [path])):
        with pytest.raises(KeyError, match='a tuple has no'):
            change(tree, 'pair/0')


def test_two_arrays_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two arrays of an example are named 'a/x'"):
        nested.leaves_with_names({'a': {'x': X}, 'a/x': X})


def tree(n: int) -> dict[str, Any]:
    """Returns a batch of n examples."""
    x = np.arange(n, dtype=np.float32)
    return {
        'inputs': {'x': x[:, None] * [1, 10], 'none': None},
        'pair': (x, -x),
        'list': [x],
        'label': x,
    }


def test_transforms_take_a_key_path() -> None:
    batch = tree(4)
    found = transforms.ToFloat(key='inputs/x', scale=2)(batch)
    np.testing.assert_array_equal(found['inputs']['x'], 2 * batch['inputs']['x'])
    assert found['pair'] is batch['pair'] and found['inputs']['none'] is None
    found = transforms.Normalize(key='pair/1', mean=1.0, std=2.0)(batch)
    np.testing.assert_array_equal(found['pair'][1], (batch['pair'][1] - 1) / 2)
    assert transforms.Keep(keys=('inputs/x', 'label'))(batch).keys() == {'inputs', 'label'}
    found = transforms.Rename(names={'inputs/x': 'inputs/image', 'label': 'target'})(batch)
    names = {'inputs/image', 'pair/0', 'pair/1', 'list/0', 'target'}
    assert nested.leaves_with_names(found).keys() == names
    with pytest.raises(KeyError, match=r'inputs/image.*the batch has inputs/x, pair/0'):
        transforms.ToFloat(key='inputs/image')(batch)


def test_a_function_of_an_example_gets_a_tree_or_what_is_at_a_path() -> None:
    batch, rng = tree(4), ExampleRng(0, 0, np.zeros(4, int), np.arange(4))

    def as_graph(example: Any) -> Any:
        assert example['inputs']['x'].shape == (2,) and example['inputs']['none'] is None
        return Graph(nodes=example['inputs'], edges=[example['inputs']['x'] + 1])

    found = PerExample(fn=as_graph)(batch, rng)
    np.testing.assert_array_equal(found.nodes['x'], batch['inputs']['x'])
    np.testing.assert_array_equal(found.edges[0], batch['inputs']['x'] + 1)
    found = PerExample(fn=lambda example: example)(batch, rng)
    nested.map_arrays(np.testing.assert_array_equal, found, batch)
    found = PerExample(fn=lambda x: (x.sum(), 3 * x), field='inputs/x')(batch, rng)
    np.testing.assert_array_equal(found['inputs']['x'][1], 3 * batch['inputs']['x'])
    found = PerExample(fn=lambda pair: pair[0] - pair[1], field='pair')(batch, rng)
    np.testing.assert_array_equal(found['pair'], 2 * batch['pair'][0])


@pytest.mark.parametrize(
    ('fn', 'kind', 'message'),
    [
        (lambda e: {**e, 'label': None}, TypeError, "'label': the function returned None"),
        (
            lambda e: {'pair': e['pair'][: 1 + int(e['label'] == 2)]},
            ValueError,
            "'pair' has 2 items, not 1",
        ),
        (
            lambda e: {'deep': {'x': np.zeros(int(e['label']))}},
            ValueError,
            r"'deep/x' has shape \(0,\) in one example and \(1,\)",
        ),
    ],
)
def test_mistakes_in_a_function_of_an_example_are_named(
    fn: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        PerExample(fn=fn)(tree(4), ExampleRng(0, 0, np.zeros(4, int), np.arange(4)))


class Items:
    """Trees; one of them differs."""

    def __init__(self, other: Any = None):
        self._other = other

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        if i == 5 and self._other is not None:
            return self._other
        return {'pair': (np.float32(i), np.arange(i, i + 2)), 'deep': {'list': [i, 2]}}


def test_items_are_stacked_as_trees() -> None:
    source = RandomAccessSource(Items())
    assert source.spec['deep']['list'] == ArraySpec((2,), np.dtype(int))
    batch = source.gather(np.array([3, 1]))
    assert batch['pair'][0].tolist() == [3, 1] and batch['deep']['list'].tolist() == [
        [3, 2],
        [1, 2],
    ]


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        (
            {'pair': (np.float32(1), np.arange(2)), 'deep': {}},
            "example 5 has another structure than example 0: 'deep' has the keys , not list",
        ),
        (
            {'pair': (np.float32(1), np.arange(3)), 'deep': {'list': [1, 2]}},
            r"'pair/1' of example 5 is int64 \(3,\), but in example 0 it is int64 \(2,\)",
        ),
    ],
)
def test_an_item_that_differs_is_named(other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomAccessSource(Items(other)).gather(np.arange(8))


def test_a_source_of_single_arrays_is_refused() -> None:
    with pytest.raises(TypeError, match='the items of list are of type ndarray; expected dicts'):
        RandomAccessSource([X, X])


def test_arrays_of_different_lengths_are_named_by_path() -> None:
    with pytest.raises(ValueError, match=r"'a/x': 3, 'b/0': 2"):
        ArraySource({'a': {'x': X}, 'b': (X[:2], Y)})


@pytest.mark.parametrize('remainder', ['carry', 'pad'])
def test_grain_reads_the_trees_of_the_other_loader(remainder: str) -> None:
    source, options = ArraySource(tree(10)), {'batch_size': 4, 'remainder': remainder}
    other = TrainLoader(source=source, **options).block(1, 3)
    loader = GrainLoader(source=source, **options, threads=2, task_rows=3)
    block = loader.block(1, 3)
    loader.close()
    nested.map_arrays(np.testing.assert_array_equal, block.arrays, other.arrays)
    assert ('_mask' in block.arrays) == (remainder == 'pad')


def test_a_mixture_has_the_trees_of_its_sources() -> None:
    mixture = Mixture([ArraySource(tree(3)), ArraySource(tree(5))])
    batch = mixture.gather(np.arange(8))
    assert sorted(batch['pair'][0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 4]
    np.testing.assert_array_equal(batch['pair'][0], batch['label'])
    with pytest.raises(ValueError, match=r'Source 0 has inputs/x: .*source 1 has x: '):
        Mixture([ArraySource(tree(3)), ArraySource({'x': X})])


def test_a_stream_filters_and_stacks_trees() -> None:
    stages = (
        Filter(keep=LongerThan(length=1, field='deep/list')),
        Map(fn=lambda e: (e['pair'], 1)),
    )
    loader = StreamLoader(source=Items(), batch_size=4, stages=stages, shuffle=False, threads=0)
    (pair, ones) = loader.block(0, 1).arrays
    assert pair[0].tolist() == [[0, 1, 2, 3]] and ones.tolist() == [[1, 1, 1, 1]]
    loader.close()
    loader = StreamLoader(source=Items({'pair': None}), batch_size=8, shuffle=False, threads=0)
    with pytest.raises(ValueError, match=r'the stream has .*deep/list.* then '):
        loader.block(0, 1)
    loader.close()
