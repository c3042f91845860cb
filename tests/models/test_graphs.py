# SPDX-License-Identifier: Apache-2.0
"""Masks, sums and means over graphs, with padding and without."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests import ragged
from tests.marks import slow_after
from trainer.models import graphs


def batch(rows: int, count: int = 5) -> tuple[Any, list[Any]]:
    """Returns a batch of `count` graphs in `rows` places, and the graphs."""
    source = ragged.molecules(count)
    examples = [source[i] for i in range(count)]
    return source.collate(examples, rows)['graph'], examples


@pytest.mark.parametrize('rows', slow_after(1, [9, 6]))
def test_masks_are_true_for_what_is_no_padding(rows: int) -> None:
    graph, examples = batch(rows)
    nodes = sum(len(each['nodes']) for each in examples)
    np.testing.assert_array_equal(jax.jit(graphs.graph_mask)(graph), np.arange(rows) < 5)
    is_node, is_edge = jax.jit(graphs.node_mask)(graph), jax.jit(graphs.edge_mask)(graph)
    np.testing.assert_array_equal(is_node, np.arange(len(graph.nodes)) < nodes)
    # Rings have as many edges as nodes.
    np.testing.assert_array_equal(is_edge, np.arange(len(graph.senders)) < nodes)
    of_nodes = np.asarray(graphs.graph_of_nodes(graph))[np.asarray(is_node)]
    of_edges = np.asarray(graphs.graph_of_edges(graph))[np.asarray(is_edge)]
    sizes = [len(each['nodes']) for each in examples]
    np.testing.assert_array_equal(of_nodes, np.repeat(np.arange(5), sizes))
    np.testing.assert_array_equal(of_edges, of_nodes)


def test_sums_and_means_are_those_of_each_graph_alone() -> None:
    graph, examples = batch(8)
    sums, means = graphs.sum_nodes(graph, graph.nodes), graphs.mean_nodes(graph, graph.nodes)
    for i, example in enumerate(examples):
        np.testing.assert_allclose(sums[i], example['nodes'].sum(0), rtol=1e-5)
        np.testing.assert_allclose(means[i], example['nodes'].mean(0), rtol=1e-5)
    assert not sums[5:].any() and not means[5:].any()


def test_edges_are_summed_where_they_end() -> None:
    graph, examples = batch(6)
    incoming = np.asarray(graphs.sum_edges(graph, graph.edges))
    first = examples[0]
    # In a ring, the edge that ends at a node begins at the one before it.
    np.testing.assert_allclose(incoming[: len(first['nodes'])], np.roll(first['edges'], 1, 0))
