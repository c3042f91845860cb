# SPDX-License-Identifier: Apache-2.0
"""Nested batches: a dict of arrays by path inside of the trainer, and the tree again for users."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.core
import flax.struct
import jax
import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.input.structure import Structure, is_flat


class Graph(NamedTuple):
    nodes: Any
    edges: Any


@flax.struct.dataclass
class Pair:
    left: Any
    right: Any


X, Y = np.ones((4, 2)), np.zeros(4)


@pytest.mark.parametrize(
    ('tree', 'names'),
    [
        ({'inputs': {'x': X, 'z': Y}, 'y': Y}, ['inputs/x', 'inputs/z', 'y']),
        ((X, Y), ['0', '1']),
        ([X, (Y,)], ['0', '1/0']),
        (Graph(X, None), ['nodes']),
        ({'graph': Graph(X, Y), 'none': None}, ['graph/nodes', 'graph/edges']),
        ({'pair': Pair(X, Y)}, ['pair/left', 'pair/right']),
    ],
)
def test_a_tree_is_flattened_and_rebuilt(tree: Any, names: list[str]) -> None:
    structure = Structure.from_tree(tree, 'config.data')
    assert structure is not None
    fields = structure.flatten(tree, 'config.data')
    assert list(fields) == names
    again = structure.rebuild(fields)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert jax.tree.leaves(again)[0] is jax.tree.leaves(tree)[0]


def test_a_dict_of_arrays_has_no_structure() -> None:
    assert Structure.from_tree({'a/x': X, '_mask': Y}, 'config.data') is None
    assert is_flat({'x': jax.ShapeDtypeStruct((3,), np.float32)})
    assert not is_flat({'x': X, 'none': None})


def test_the_mask_is_beside_the_fields() -> None:
    tree = {'inputs': {'x': X}, '_mask': Y}
    structure = Structure.from_tree(tree, 'config.data')
    assert structure is not None and structure.names == ('inputs/x',)
    assert structure.flatten(tree, '').keys() == {'inputs/x', '_mask'}
    assert structure.rebuild(structure.flatten(tree, '')) == {'inputs': {'x': X}}
    assert structure.has_place_for_mask
    pair = Structure.from_tree((X, Y), '')
    assert pair is not None and not pair.has_place_for_mask


def test_a_part_of_the_tree_is_selected_by_path() -> None:
    tree = {'a/b': {'c': X}, 'a': {'d': Graph(X, Y)}, 'pair': [X, {'e': Y}]}
    structure = Structure.from_tree(tree, '')
    assert structure is not None
    fields = structure.flatten(tree, '')
    for path, expected in [
        ('a/b', tree['a/b']),
        ('a/d', tree['a']['d']),
        ('pair/1', {'e': Y}),
        ('pair', tree['pair']),
    ]:
        found = structure.select(path).rebuild(fields)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert jax.tree.leaves(found)[0] is jax.tree.leaves(expected)[0]


def test_a_mapping_at_the_top_is_a_dict() -> None:
    tree = flax.core.freeze({'a': {'x': X}, '_mask': Y})
    structure = Structure.from_tree(tree, '')
    assert structure is not None and type(structure.template) is dict
    assert structure.flatten(tree, '')['_mask'] is Y


@pytest.mark.parametrize(
    ('tree', 'message'),
    [
        ({'a': {'x': X}}, 'a batch lacks y, which the first one had'),
        ({'a': {'x': X, 'z': X}, 'y': Y}, 'a batch has a/z, which the first one had not'),
        ({'a': [X], 'y': Y}, 'a batch lacks a/x'),
        ({'a': {'x': X}, 'y': Y, 'none': None}, 'all batches need one structure'),
    ],
)
def test_another_structure_is_an_error(tree: Any, message: str) -> None:
    structure = Structure.from_tree({'a': {'x': X}, 'y': Y}, '')
    assert structure is not None
    with pytest.raises(UserError, match=f'config.data: .*{message}'):
        structure.flatten(tree, 'config.data')


def test_two_arrays_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"config\.data: two arrays of the batch are named 'a/x'"):
        Structure.from_tree({'a': {'x': X}, 'a/x': X}, 'config.data')
    with pytest.raises(UserError, match=r'config\.data: the batch has no arrays'):
        Structure.from_tree({'a': None}, 'config.data')
