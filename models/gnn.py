# SPDX-License-Identifier: Apache-2.0
"""A network of messages along the edges of graphs, such as molecules.

N: nodes of all graphs, E: edges of all graphs, G: graphs, all with padding; F: features of a node
or an edge, D: width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from .graphs import graph_of_nodes, mean_nodes, node_mask, sum_edges, sum_nodes

# Of the sums over the nodes of a graph, so that they are about as large as the means.
_SCALE = 1 / 16


class Categories(nn.Module):
    """Embeds integer features, and adds the vectors of all features of a node or an edge.

    Attributes:
        sizes: number of values of each feature.
        width: width of the vectors.
        dtype: dtype of the computation; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    sizes: tuple[int, ...]
    width: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Returns (..., D) for int (..., F)."""
        # One table for all features: the values of each begin where those of the one before end.
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        table = nn.Embed(
            sum(self.sizes),
            self.width,
            name='embed',
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        return table(features + jnp.array(starts, features.dtype)).sum(-2)


class Block(nn.Module):
    """One round of messages (Hu et al., arXiv:1905.12265), and two dense layers for each node.

    The message of an edge is the state of the node where it begins, plus the vector of the edge.

    Attributes:
        edge_sizes: number of values of each feature of an edge; empty without features.
        dropout_rate: dropout of what is added to the state, in training.
        norm: 'batch' or 'layer'.
        dtype: dtype of the computation; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    edge_sizes: tuple[int, ...] = ()
    dropout_rate: float = 0.0
    norm: str = 'batch'
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Any, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the states of the nodes after this round, (N, D).

        Args:
            graph: the graphs, of whose features those of edges are read.
            x: states of the nodes, (N, D).
            train: whether dropout is active, and batch norm uses the statistics of the batch.
        """
        width = x.shape[-1]
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        m_ED = x[graph.senders]
        if self.edge_sizes:
            m_ED = m_ED + Categories(self.edge_sizes, width, name='edges', **dtypes)(graph.edges)
        y_ND = x + sum_edges(graph, nn.relu(m_ED))
        y_ND = nn.Dense(2 * width, name='widen', **dtypes)(y_ND)
        y_ND = nn.relu(self._normalize(graph, y_ND, train, 'norm_1'))
        y_ND = nn.Dense(width, name='narrow', **dtypes)(y_ND)
        y_ND = nn.relu(self._normalize(graph, y_ND, train, 'norm_2'))
        return x + nn.Dropout(self.dropout_rate, deterministic=not train)(y_ND)

    def _normalize(self, graph: Any, x: jax.Array, train: bool, name: str) -> jax.Array:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if self.norm == 'layer':
            return nn.LayerNorm(name=name, **dtypes)(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name, **dtypes)
        return norm(x, mask=node_mask(graph)[:, None])


class GraphNetwork(nn.Module):
    """Several rounds of messages, and outputs for each graph.

    Each graph also has a virtual node that all its nodes exchange messages with, so that far atoms
    of a molecule know of each other (Gilmer et al., arXiv:1704.01212). The output is computed from
    the sum and the mean over the nodes, of all rounds (Xu et al., arXiv:1806.03536).

    Attributes:
        node_sizes: number of values of each feature of a node.
        edge_sizes: number of values of each feature of an edge; empty without features.
        outputs: shape of the output for each graph, () for a number; or several by name.
        width: width of the states of nodes.
        rounds: number of rounds.
        dropout_rate: dropout in training.
        norm: 'batch', or 'layer', which does not depend on other graphs.
        has_virtual_node: whether there are virtual nodes.
        dtype: dtype of the computation; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    # Batch statistics leave padding out; the trainer warns of models that do not say so.
    masks_padding: ClassVar[bool] = True

    node_sizes: tuple[int, ...]
    edge_sizes: tuple[int, ...] = ()
    outputs: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    width: int = 64
    rounds: int = 4
    dropout_rate: float = 0.0
    norm: str = 'batch'
    has_virtual_node: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Any, train: bool = False) -> Any:
        """Returns the output for each graph, (G, ...), or a dict of them; those of padding, too.

        Args:
            graph: `trainer.data.graphs.GraphsTuple` with integer features: nodes (N, F) and, if
                `edge_sizes` is not empty, edges (E, F).
            train: whether dropout is active, and batch norm uses the statistics of the batch.
        """
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        x_ND = Categories(self.node_sizes, self.width, name='nodes', **dtypes)(graph.nodes)
        v_GD = jnp.zeros((len(graph.n_node), self.width), x_ND.dtype)
        found = []
        for i in range(self.rounds):
            if i and self.has_virtual_node:
                v_GD = v_GD + self._mix(mean_nodes(graph, x_ND) + v_GD, f'virtual_{i}')
                x_ND = x_ND + v_GD[graph_of_nodes(graph)]
            block = Block(
                self.edge_sizes, self.dropout_rate, self.norm, name=f'round_{i}', **dtypes
            )
            x_ND = block(graph, x_ND, train)
            found += [_SCALE * sum_nodes(graph, x_ND), mean_nodes(graph, x_ND)]
        y_GD = self._mix(dropout(jnp.concatenate(found, axis=-1)), 'readout')
        y_GD = dropout(y_GD)
        if not isinstance(self.outputs, Mapping):
            return self._output(y_GD, self.outputs, 'output')
        return {name: self._output(y_GD, shape, name) for name, shape in self.outputs.items()}

    def _mix(self, x: jax.Array, name: str) -> jax.Array:
        """Returns a hidden layer of normalized vectors, (G, D)."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = nn.LayerNorm(name=f'{name}_norm', **dtypes)(x)
        return nn.relu(nn.Dense(self.width, name=name, **dtypes)(x))

    def _output(self, x: jax.Array, shape: tuple[int, ...], name: str) -> jax.Array:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = nn.Dense(math.prod(shape), name=name, **dtypes)(x)
        return y.reshape(len(x), *shape)
