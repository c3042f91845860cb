# SPDX-License-Identifier: Apache-2.0
"""Examples of different sizes, sequences and graphs, and small configs that train on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from trainer.data.graphs import GraphSource
from trainer.data.sequences import PaddedSequences
from trainer.models import graphs
from trainer.tasks.task import TaskOutput

HERE = __name__
LENGTHS = (4, 8, 12)


class Sentences:
    """Sequences of 1 to 12 tokens; each token's tag is whether it is odd."""

    def __init__(self, n: int = 50, seed: int = 0):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 13, n)
        self.tokens = [rng.integers(1, 20, size).astype(np.int32) for size in sizes]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self.tokens[index]
        return {'tokens': tokens, 'tags': tokens % 2, 'number': np.int64(index)}


def sentences(n: int = 50, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> PaddedSequences:
    """Returns the source of padded sentences."""
    return PaddedSequences(Sentences(n, seed), fields=('tokens', 'tags'), lengths=lengths)


class Tagger(nn.Module):
    """Two logits for each token, which also depend on the mean of its sentence."""

    @nn.compact
    def __call__(self, tokens: jax.Array, is_real: jax.Array) -> jax.Array:
        """Returns float32 (batch, length, 2)."""
        x = nn.Embed(20, 8)(tokens)
        real = is_real[..., None]
        mean = (x * real).sum(1, keepdims=True) / real.sum(1, keepdims=True)
        return nn.Dense(2)(nn.relu(nn.Dense(8)(jnp.concatenate([x, x * 0 + mean], -1))))


class Tagging:
    """Loss and accuracy of each token."""

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> TaskOutput:
        logits = model(batch['tokens'], batch['is_real'])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['tags'])
        hits = (logits.argmax(-1) == batch['tags']).astype(jnp.float32)
        return TaskOutput(loss=loss, weights=batch['is_real'], metrics={'accuracy': hits})

    def predict(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the number of odd tokens, which does not depend on the padding."""
        odd = model(batch['tokens'], batch['is_real']).argmax(-1) * batch['is_real']
        return {'odd': odd.sum(-1), 'number': batch['number']}


class Molecules:
    """Graphs of 2 to 9 nodes in a ring; the label is whether the mean feature is positive."""

    def __init__(self, n: int = 40, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.nodes = [
            rng.normal(rng.choice([-1, 1]), 1, (size, 3)).astype(np.float32)
            for size in rng.integers(2, 10, n)
        ]

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        nodes = self.nodes[index]
        here = np.arange(len(nodes), dtype=np.int32)
        return {
            'nodes': nodes,
            'edges': nodes[:, :1] * 2,
            'senders': here,
            'receivers': (here + 1) % len(nodes),
            'label': np.int32(nodes.mean() > 0),
            'number': np.int64(index),
        }


def molecules(n: int = 40, seed: int = 0, num_shapes: int = 3) -> GraphSource:
    """Returns the source of graphs."""
    return GraphSource(Molecules(n, seed), num_shapes=num_shapes)


class BareGraphs(GraphSource):
    """A batch is the tuple alone, with the labels as its globals."""

    def collate(self, examples: list[Any], rows: int) -> Any:
        batch = super().collate(examples, rows)
        return batch['graph']._replace(globals=batch['label'])


def bare_molecules(n: int = 40, seed: int = 0) -> BareGraphs:
    """Returns the source of graphs without a dict around them."""
    return BareGraphs(Molecules(n, seed))


class GraphNet(nn.Module):
    """One round of messages, and the sum over the nodes of each graph."""

    @nn.compact
    def __call__(self, graph: Any) -> jax.Array:
        """Returns float32 (graphs, 2)."""
        messages = nn.Dense(8)(jnp.concatenate([graph.nodes[graph.senders], graph.edges], -1))
        nodes = jnp.concatenate([graph.nodes, graphs.sum_edges(graph, messages)], -1)
        return nn.Dense(2)(graphs.sum_nodes(graph, nn.relu(nn.Dense(8)(nodes))))


class Molecular:
    """Loss and accuracy of each graph."""

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> TaskOutput:
        logits = model(batch['graph'])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
        hits = (logits.argmax(-1) == batch['label']).astype(jnp.float32)
        return TaskOutput(loss=loss, metrics={'accuracy': hits})

    def predict(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the logits."""
        return {'logits': model(batch['graph']), 'number': batch['number']}


class BareMolecular(Molecular):
    """The same task for graphs without a dict around them."""

    def __call__(self, model: Any, batch: Any) -> TaskOutput:
        return super().__call__(model, {'graph': batch, 'label': batch.globals})


def make_config(kind: str = 'sentences', **changes: Any) -> ml_collections.ConfigDict:
    """Returns a config of 12 steps.

    Args:
        kind: 'sentences', 'molecules' or 'bare_molecules'.
        **changes: top-level keys to replace.
    """
    model, task = {
        'sentences': ('Tagger', 'Tagging'),
        'molecules': ('GraphNet', 'Molecular'),
        'bare_molecules': ('GraphNet', 'BareMolecular'),
    }[kind]
    source = {'target': f'{HERE}:{kind}'}
    config = ml_collections.ConfigDict()
    config.train_for = '12 steps'
    config.model = dict(target=f'{HERE}:{model}')
    config.task = dict(target=f'{HERE}:{task}')
    config.data = dict(source=source, batch_size=6)
    config.evals = dict(dev=dict(every='6 steps', data=dict(source={**source, 'n': 21, 'seed': 1})))
    config.optimizer = dict(target='optax:adam', learning_rate=0.01)
    config.log = dict(every='6 steps', tensorboard=False)
    for key, value in changes.items():
        with config.ignore_type():
            config[key] = value
    return config


def score(examples: Mapping[str, np.ndarray]) -> dict[str, float]:
    """A score over the predictions and a field of the batch; in the order of the split."""
    np.testing.assert_array_equal(examples['number'], np.arange(21))
    others = [x for name, x in sorted(examples.items()) if name != 'number']
    weights = np.arange(1, 22)
    return {'sum': float(sum((x.reshape(21, -1).sum(1) * weights).sum() for x in others))}


def get_config(kind: str) -> ml_collections.ConfigDict:
    """Returns a config with a score, for commands."""
    config = make_config(kind)
    field = {'sentences': 'length', 'molecules': 'label'}[kind]
    config.evals.dev.score = dict(ref=f'{HERE}:score', fields=(field,))
    return config
