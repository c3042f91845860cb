# SPDX-License-Identifier: Apache-2.0
"""Functions for models of graphs: masks of padding, and sums and means over nodes and edges.

A graph here is a `trainer.data.graphs.GraphsTuple` or a `jraph.GraphsTuple`: G graphs with N nodes
and E edges together, padded with `pad_with_graphs` or by `trainer.data.graphs.GraphSource`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def graph_mask(graph: Any) -> jax.Array:
    """Returns which graphs are no padding, bool (G,)."""
    # The first graph of padding has at least one node, the graphs after it have none.
    numbers = jnp.arange(len(graph.n_node))
    return numbers < jnp.where(graph.n_node > 0, numbers, 0).max()


def node_mask(graph: Any) -> jax.Array:
    """Returns which nodes are no padding, bool (N,)."""
    return jnp.arange(_num_nodes(graph)) < (graph.n_node * graph_mask(graph)).sum()


def edge_mask(graph: Any) -> jax.Array:
    """Returns which edges are no padding, bool (E,)."""
    return jnp.arange(len(graph.senders)) < (graph.n_edge * graph_mask(graph)).sum()


def graph_of_nodes(graph: Any) -> jax.Array:
    """Returns the index of the graph that each node belongs to, int32 (N,)."""
    return _repeat(graph.n_node, _num_nodes(graph))


def graph_of_edges(graph: Any) -> jax.Array:
    """Returns the index of the graph that each edge belongs to, int32 (E,)."""
    return _repeat(graph.n_edge, len(graph.senders))


def sum_edges(graph: Any, edges: jax.Array) -> jax.Array:
    """Returns for each node the sum over the edges that end at it, (N, ...).

    Args:
        graph: one or several graphs, with padding.
        edges: values of the edges, (E, ...).
    """
    return jax.ops.segment_sum(edges, graph.receivers, _num_nodes(graph))


def sum_nodes(graph: Any, nodes: jax.Array) -> jax.Array:
    """Returns for each graph the sum over its nodes, (G, ...).

    Args:
        graph: one or several graphs, with padding.
        nodes: values of the nodes, (N, ...).
    """
    return jax.ops.segment_sum(nodes, graph_of_nodes(graph), len(graph.n_node))


def mean_nodes(graph: Any, nodes: jax.Array) -> jax.Array:
    """Returns for each graph the mean over its nodes, (G, ...); 0 for a graph without nodes.

    Args:
        graph: one or several graphs, with padding.
        nodes: values of the nodes, (N, ...).
    """
    sums = sum_nodes(graph, nodes)
    counts = jnp.maximum(graph.n_node, 1).reshape(-1, *(1,) * (sums.ndim - 1))
    return sums / counts


def _num_nodes(graph: Any) -> int:
    return len(jax.tree.leaves(graph.nodes)[0])


def _repeat(counts: jax.Array, total: int) -> jax.Array:
    indices = jnp.arange(len(counts), dtype=jnp.int32)
    return jnp.repeat(indices, counts, total_repeat_length=total)
