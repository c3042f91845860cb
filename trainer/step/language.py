# SPDX-License-Identifier: Apache-2.0
"""The task of language models: the next token at every position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import optax

from trainer.step.combine import mean_softmax
from trainer.step.metrics import mean_collection
from trainer.step.tasks import Batch, TaskOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """Cross-entropy of each token given those before it, in rows of one or several sequences.

    The model is called as `model(tokens)`, with packed rows as `model(tokens, segments=...,
    positions=...)`, and returns logits (batch, length, vocabulary). The last token of a sequence
    has no target and does not count, and neither does what is behind the last sequence.

    Attributes:
        tokens: batch key of the tokens, int (batch, length).
        segments: batch key of the number of each token's sequence, int (batch, length), 0 where
            there is none; None where each row is one sequence.
        positions: batch key of each token's place in its sequence, int (batch, length), or None.
        weight: batch key of weights, (batch,) or (batch, length), or None.
    """

    tokens: str = 'tokens'
    segments: str | None = None
    positions: str | None = None
    weight: str | None = None

    @property
    def metrics(self) -> type[clu.metrics.Collection]:
        """loss in nats and accuracy, over all tokens that have a target."""
        return mean_collection(('loss', 'accuracy'))

    def __call__(self, model: Callable[..., Any], batch: Batch) -> TaskOutput:
        """Returns losses and hits (batch, length)."""
        tokens = batch[self.tokens]
        logits = jnp.asarray(self._logits(model, batch), jnp.float32)
        targets = _next(tokens)
        counts = jnp.ones_like(tokens, jnp.float32)
        if self.segments is not None:
            segments = batch[self.segments]
            counts = ((segments == _next(segments)) & (segments > 0)).astype(jnp.float32)
        counts = counts.at[:, -1].set(0.0)
        if self.weight is not None:
            given = batch[self.weight]
            counts = counts * given.reshape(*given.shape, *[1] * (counts.ndim - given.ndim))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        hits = {'accuracy': logits.argmax(-1) == targets}
        return TaskOutput(loss=loss, weights=counts, metrics=hits)

    def combine(self, logits: jax.Array) -> jax.Array:
        """Returns an ensemble's logits, of the mean of its members' probabilities.

        Args:
            logits: (members, batch, length, vocabulary).
        """
        return mean_softmax(logits)

    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, jax.Array]:
        """Returns the most probable next token at each position, int (batch, length)."""
        return {'next': jnp.asarray(self._logits(model, batch)).argmax(-1)}

    def _logits(self, model: Callable[..., Any], batch: Batch) -> Any:
        named = {'segments': self.segments, 'positions': self.positions}
        return model(batch[self.tokens], **{k: batch[v] for k, v in named.items() if v is not None})


def _next(x: jax.Array) -> jax.Array:
    return jnp.roll(x, -1, axis=1)
