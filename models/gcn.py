# SPDX-License-Identifier: Apache-2.0
"""A graph convolutional network that classifies the nodes of one graph.

B: batch, N: nodes, E: edges, D: width, C: classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class GCN(nn.Module):
    """Graph convolutions of node embeddings (Kipf and Welling, arXiv:1609.02907).

    Attributes:
        num_nodes: number of nodes that have an embedding.
        num_classes: number of logits.
        width: width of the embeddings, and of the states of nodes.
        rounds: number of convolutions.
        dropout_rate: dropout of the states in training.
        dtype: dtype of the computation; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    num_nodes: int
    num_classes: int
    width: int = 16
    rounds: int = 2
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
        """Returns logits (B, N, C).

        Args:
            graph: 'nodes', int (B, N), the number of each node; 'senders' and 'receivers', int
                (B, E), the nodes where edges begin and end, each edge in both directions.
            train: whether dropout is active.
        """
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x_BND = nn.Embed(self.num_nodes, self.width, name='embed', **dtypes)(graph['nodes'])
        for i in range(self.rounds):
            x_BND = nn.Dense(self.width, name=f'round_{i}', **dtypes)(x_BND)
            x_BND = nn.relu(jax.vmap(_average)(x_BND, graph['senders'], graph['receivers']))
            x_BND = nn.Dropout(self.dropout_rate, deterministic=not train)(x_BND)
        return nn.Dense(self.num_classes, name='head', **dtypes)(x_BND)


def _average(x_ND: jax.Array, senders: jax.Array, receivers: jax.Array) -> jax.Array:
    """Returns the state of each node and its neighbors, weighted by their degrees, (N, D)."""
    # Each node is a neighbor of itself, too.
    degree_N = 1 + jnp.zeros(len(x_ND), x_ND.dtype).at[receivers].add(1)
    y_ND = x_ND / jnp.sqrt(degree_N)[:, None]
    sums_ND = y_ND.at[receivers].add(y_ND[senders])
    return sums_ND / jnp.sqrt(degree_N)[:, None]
