# SPDX-License-Identifier: Apache-2.0
"""Graphs: batches of a few static shapes, whose padding changes nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import ragged
from trainer.data.graphs import GraphSource, GraphsTuple, choose_sizes
from trainer.data.loader import TrainLoader


def graph(nodes: int, edges: int, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(nodes)
    return {
        'nodes': rng.normal(size=(nodes, 2)).astype(np.float32),
        'edges': rng.normal(size=(edges, 1)).astype(np.float32),
        'senders': rng.integers(0, nodes, edges),
        'receivers': rng.integers(0, nodes, edges),
        'label': np.int32(nodes),
        **more,
    }


GRAPHS = [graph(3, 4), graph(2, 0), graph(5, 7)]


def collate(rows: int = 4, examples: Any = GRAPHS, **options: Any) -> dict[str, Any]:
    settings = {'sizes': [(16, 32)], **options}
    return GraphSource(examples, **settings).collate(examples, rows)


def test_nodes_and_edges_of_all_graphs() -> None:
    batch = collate()
    made = batch['graph']
    np.testing.assert_array_equal(made.nodes[:10], np.concatenate([g['nodes'] for g in GRAPHS]))
    np.testing.assert_array_equal(made.edges[:11], np.concatenate([g['edges'] for g in GRAPHS]))
    np.testing.assert_array_equal(made.senders[:4], GRAPHS[0]['senders'])
    np.testing.assert_array_equal(made.receivers[4:11], GRAPHS[2]['receivers'] + 5)
    np.testing.assert_array_equal(batch['label'], [3, 2, 5, 0])
    assert made.globals is None
    assert {x.dtype for x in (made.senders, made.receivers, made.n_node, made.n_edge)} == {
        np.dtype(np.int32)
    }


def test_the_last_graph_has_the_padding() -> None:
    made = collate()['graph']
    np.testing.assert_array_equal(made.n_node, [3, 2, 5, 6])
    np.testing.assert_array_equal(made.n_edge, [4, 0, 7, 21])
    assert not made.nodes[10:].any() and not made.edges[11:].any()
    # Its edges begin and end at its own nodes.
    assert (made.senders[11:] == 10).all() and (made.receivers[11:] == 10).all()


def test_missing_graphs_are_empty() -> None:
    made = collate(rows=6)['graph']
    np.testing.assert_array_equal(made.n_node, [3, 2, 5, 6, 0, 0])
    np.testing.assert_array_equal(made.n_edge, [4, 0, 7, 21, 0, 0])


def test_features_may_be_trees_or_missing() -> None:
    examples = [
        {
            **graph(n, n, globals=[1.0, n]),
            'edges': None,
            'nodes': {'x': np.ones((n, 2)), 'y': np.arange(n)},
        }
        for n in (2, 3)
    ]
    made = collate(3, examples)['graph']
    assert made.edges is None and made.nodes['x'].shape == (16, 2)
    np.testing.assert_array_equal(made.nodes['y'], [0, 1, 0, 1, 2] + [0] * 11)
    np.testing.assert_array_equal(made.globals, [[1, 2], [1, 3], [0, 0]])


def test_texts_of_graphs_may_have_any_length() -> None:
    examples = [{**graph(2, 1), 'name': name} for name in ('CO', 'C1=CC=CC=C1')]
    assert collate(3, examples)['name'].tolist() == ['CO', 'C1=CC=CC=C1', '']


def test_the_first_size_with_room() -> None:
    sizes = [(8, 8), (11, 11), (16, 32)]
    assert collate(examples=GRAPHS[:1], sizes=sizes)['graph'].nodes.shape == (8, 2)
    assert collate(sizes=sizes)['graph'].nodes.shape == (11, 2)
    # One node is for the edges of padding.
    with pytest.raises(ValueError, match=r'10 nodes and 11 edges, .* room for 9 and 11'):
        collate(sizes=[(10, 11)])
    assert GraphSource(GRAPHS, sizes=sizes).num_shapes == 3
    with pytest.raises(ValueError, match=r'a transform has made them larger\. Set `sizes`'):
        GraphSource(GRAPHS).collate([graph(99, 99)], 2)


@pytest.mark.parametrize('batch_size', [1, 5, 40, 100])
def test_every_batch_fits_the_chosen_sizes(batch_size: int) -> None:
    """Also one that has a graph twice, because it crosses the border of an epoch."""
    source = ragged.molecules()
    loader = TrainLoader(source=source, batch_size=batch_size)
    sizes = source.sizes(batch_size)
    assert 1 <= len(sizes) <= 3 and sizes == sorted(sizes)
    assert all(nodes % 16 == 0 and edges % 16 == 0 for nodes, edges in sizes)
    shapes = [loader.block(step, 1).arrays['graph'].nodes.shape[1] for step in range(50)]
    assert set(shapes) <= {nodes for nodes, _ in sizes}


def test_most_batches_have_the_first_size() -> None:
    rng = np.random.default_rng(0)
    counts = np.stack([rng.poisson(24, 5000), rng.poisson(52, 5000)], 1)
    first, *_, last = choose_sizes(counts, 64, 3)
    sums = rng.permuted(counts, axis=0)[: 64 * 78].reshape(78, 64, 2).sum(1)
    assert ((sums < first).mean(0) > 0.9).all()
    assert first[0] < 1.15 * 24 * 64 < last[0]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match='expected pairs'):
        GraphSource(GRAPHS, sizes=[(9, 9), (8, 8)])
    with pytest.raises(ValueError, match='has no graphs'):
        GraphSource([])
    with pytest.raises(ValueError, match="a graph has no 'senders'; it is a dict of nodes"):
        collate(examples=[{'nodes': np.ones(2)}])
    wrong = {**graph(2, 2), 'receivers': np.array([0, 2])}
    with pytest.raises(ValueError, match='of 2 nodes ends at node 2; expected 0 to 1'):
        collate(examples=[wrong])
    with pytest.raises(ValueError, match=r'differ in length: \[2\] for nodes, \[2, 3\] for edges'):
        collate(examples=[{**graph(2, 2), 'senders': np.array([0, 1, 0])}])
    other = {**graph(2, 2), 'nodes': np.ones((2, 3), np.float32)}
    with pytest.raises(ValueError, match=r"'nodes' is float32 \(2,\) and float32 \(3,\) in graphs"):
        collate(examples=[graph(2, 2), other])
    with pytest.raises(ValueError, match="'graph' is that of the graph itself"):
        collate(examples=[graph(2, 2, graph=1)])


def test_padding_is_as_jraph_makes_it() -> None:
    jraph = pytest.importorskip('jraph')
    parts = [
        jraph.GraphsTuple(
            **{n: g[n] for n in ('nodes', 'edges', 'senders', 'receivers')},
            globals=None,
            n_node=np.array([len(g['nodes'])]),
            n_edge=np.array([len(g['edges'])]),
        )
        for g in GRAPHS
    ]
    theirs = jraph.pad_with_graphs(jraph.batch_np(parts), 16, 32, 6)
    ours = collate(rows=6)['graph']
    assert ours._fields == theirs._fields
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            np.testing.assert_array_equal(mine, other)
    np.testing.assert_array_equal(jraph.get_graph_padding_mask(ours), [1, 1, 1, 0, 0, 0])
    # A network of jraph takes ours, and returns it.
    network = jraph.GraphConvolution(lambda nodes: nodes @ jnp.ones((2, 3)))
    result = jax.jit(network)(ours)
    assert isinstance(result, GraphsTuple) and result.nodes.shape == (16, 3)
