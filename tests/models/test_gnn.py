# SPDX-License-Identifier: Apache-2.0
"""Networks on graphs: padding, the order of nodes and edges, and other graphs change nothing."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.marks import slow_after
from trainer.data.graphs import GraphSource
from trainer.data.karate import KarateClub
from trainer.models.gcn import GCN
from trainer.models.gnn import GraphNetwork

SIZES = (5, 3)
DRAW = np.random.default_rng(0)


def make_graph(nodes: int, edges: int) -> dict[str, Any]:
    return {
        'nodes': DRAW.integers(0, SIZES, (nodes, 2)).astype('i4'),
        'edges': DRAW.integers(0, (4,), (edges, 1)).astype('i4'),
        'senders': DRAW.integers(0, nodes, edges),
        'receivers': DRAW.integers(0, nodes, edges),
    }


GRAPHS = [make_graph(4, 6), make_graph(1, 0), make_graph(7, 9)]


def collate(graphs: Any, rows: int, nodes: int = 16, edges: int = 32) -> Any:
    return GraphSource(graphs, sizes=[(nodes, edges)]).collate(graphs, rows)['graph']


def network(**options: Any) -> GraphNetwork:
    return GraphNetwork(
        SIZES, (4,), outputs={'decision': (1,), 'number': ()}, width=8, rounds=2, **options
    )


def init(model: Any, graph: Any) -> Any:
    """Returns variables with batch statistics that are not those of the start."""
    variables = jax.jit(model.init)(jax.random.key(0), graph)
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + draw.uniform(0, 0.1, x.shape).astype('f4'), variables)


def compute(model: Any, variables: Any, graph: Any) -> Any:
    return jax.tree.map(np.asarray, jax.jit(model.apply)(variables, graph))


def assert_close(one: Any, other: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, other)


@pytest.mark.parametrize('norm', slow_after(1, ['batch', 'layer']))
def test_padding_and_other_graphs_change_nothing(norm: str) -> None:
    model = network(norm=norm)
    whole = collate(GRAPHS, 4)
    variables = init(model, whole)
    found = compute(model, variables, whole)
    assert found['decision'].shape == (4, 1) and found['number'].shape == (4,)
    assert np.ptp(found['number'][:3]) > 1e-2
    three = jax.tree.map(lambda x: x[:3], found)
    more = compute(model, variables, collate(GRAPHS, 8, 32, 64))
    assert_close(jax.tree.map(lambda x: x[:3], more), three)
    for i, graph in enumerate(GRAPHS):
        alone = compute(model, variables, collate([graph], 2))
        assert_close(jax.tree.map(lambda x: x[:1], alone), {n: x[[i]] for n, x in found.items()})


def test_the_order_of_nodes_and_edges_changes_nothing() -> None:
    model, graph = network(), GRAPHS[2]
    moved = np.array([3, 0, 6, 2, 5, 1, 4])  # The new place of each node.
    order = np.array([8, 2, 5, 0, 7, 1, 3, 6, 4])
    other = {
        'nodes': graph['nodes'][np.argsort(moved)],
        'edges': graph['edges'][order],
        'senders': moved[graph['senders']][order],
        'receivers': moved[graph['receivers']][order],
    }
    one, two = collate([graph], 2), collate([other], 2)
    variables = init(model, one)
    assert_close(compute(model, variables, one), compute(model, variables, two))


def test_features_of_edges_and_nodes_matter() -> None:
    model, graph = network(), collate([GRAPHS[0]], 2)
    variables = init(model, graph)
    found = compute(model, variables, graph)['number'][0]
    for part in ('nodes', 'edges'):
        changed = (getattr(graph, part) + 1) % 3
        other = compute(model, variables, graph._replace(**{part: changed}))
        assert abs(other['number'][0] - found) > 1e-4, part


@pytest.mark.slow
def test_statistics_of_a_batch_do_not_count_padding() -> None:
    model = network()
    variables = init(model, collate(GRAPHS, 4))
    train = jax.jit(lambda graph: model.apply(variables, graph, True, mutable=['batch_stats']))
    one, two = (train(collate(GRAPHS, *size)) for size in ((4, 16, 32), (4, 64, 128)))
    assert_close(one[1], two[1])
    assert_close(jax.tree.map(lambda x: x[:3], one[0]), jax.tree.map(lambda x: x[:3], two[0]))


@pytest.mark.slow
def test_far_nodes_meet_in_the_virtual_node() -> None:
    """In a path of seven nodes, two rounds of messages do not reach from one end to the other."""
    ends = np.arange(6)
    path = {
        **make_graph(7, 12),
        'senders': np.concatenate([ends, ends + 1]),
        'receivers': np.concatenate([ends + 1, ends]),
    }
    graph = collate([path], 2)

    def influence(has_virtual_node: bool) -> float:
        """Returns how much the first node's feature changes the state of the last one."""
        model = network(has_virtual_node=has_virtual_node, norm='layer')
        variables = init(model, graph)

        def state(features: Any) -> Any:
            options = {'capture_intermediates': True, 'mutable': ['intermediates']}
            _, found = model.apply(variables, graph._replace(nodes=features), **options)
            return found['intermediates']['round_1']['__call__'][0][6]

        changed = graph.nodes.copy()
        changed[0] = (changed[0] + 1) % 3
        return float(np.abs(jax.jit(state)(changed) - jax.jit(state)(graph.nodes)).max())

    assert influence(False) == 0 < influence(True)


def test_convolution_is_the_product_with_the_normalized_adjacency() -> None:
    graph = KarateClub('train').gather(np.array([0]))['graph']
    model = GCN(num_nodes=34, num_classes=2, width=3, rounds=1)
    variables = jax.jit(model.init)(jax.random.key(0), graph)
    adjacency = np.eye(34)
    adjacency[graph['receivers'][0], graph['senders'][0]] = 1
    scale = 1 / np.sqrt(adjacency.sum(0))
    weights = jax.tree.map(np.asarray, variables['params'])
    x = weights['embed']['embedding'] @ weights['round_0']['kernel']
    x = np.maximum(scale[:, None] * (adjacency @ (scale[:, None] * x)), 0)
    logits = x @ weights['head']['kernel']
    np.testing.assert_allclose(compute(model, variables, graph)[0], logits, atol=1e-5)
