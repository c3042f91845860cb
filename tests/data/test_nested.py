# SPDX-License-Identifier: Apache-2.0
"""Trees of arrays: walked, named, and changed at a path."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from data import nested


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


@pytest.mark.parametrize('value', [[1, 2], (1.5, np.float32(2)), [[1], [2]], ['a', 'b'], (), 3])
def test_numbers_and_texts_alone_are_a_value(value: Any) -> None:
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
        changed = nested.with_field(tree, path, 7)
        assert nested.get_field(changed, path) == 7
        assert nested.get_field(tree, path) is not changed
    assert isinstance(nested.with_field(tree, 'graph/edges', X)['graph'], Graph)
    assert nested.get_field(nested.with_field(tree, 'a/new', Y), 'a/new') is Y
    assert list(nested.with_field({'b': X, 'a': X}, 'b', Y)) == ['b', 'a']
    assert not nested.has_field(tree, 'a/y') and not nested.has_field(tree, 'pair/x')
    with pytest.raises(KeyError, match=r'a/y.*the batch has a/x, pair/0'):
        nested.get_field(tree, 'a/y')
    with pytest.raises(KeyError, match='a tuple has no such place'):
        nested.with_field(tree, 'pair/2', X)


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
