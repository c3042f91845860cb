# SPDX-License-Identifier: Apache-2.0
"""Tasks of language models: the next token at every position, and a text as the answer to one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import optax

from trainer.modules.ensemble_outputs import mean_softmax
from trainer.tasks import returned
from trainer.tasks.checks import Check
from trainer.tasks.metrics import mean_collection
from trainer.tasks.task import Batch, TaskOutput


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
        logits = self._logits(model, batch).astype(jnp.float32)
        targets = _shift_left(tokens)
        counts = jnp.ones_like(tokens, jnp.float32)
        if self.segments is not None:
            segments = batch[self.segments]
            counts = ((segments == _shift_left(segments)) & (segments > 0)).astype(jnp.float32)
        counts = counts.at[:, -1].set(0.0)
        if self.weight is not None:
            given = batch[self.weight]
            counts = counts * given.reshape(*given.shape, *[1] * (counts.ndim - given.ndim))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        hits = {'accuracy': logits.argmax(-1) == targets}
        counted = jnp.where(counts != 0, targets, 0)
        vocabulary = logits.shape[-1]
        checks = {self.tokens: Check(counted, 0, vocabulary - 1, why=_vocabulary_hint(vocabulary))}
        return TaskOutput(loss=loss, weights=counts, metrics=hits, checks=checks)

    def combine(self, logits: jax.Array) -> jax.Array:
        """Returns an ensemble's logits, of the mean of its members' probabilities.

        Args:
            logits: (members, batch, length, vocabulary).
        """
        return mean_softmax(logits)

    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, jax.Array]:
        """Returns the most probable next token at each position, int (batch, length)."""
        return {'next': self._logits(model, batch).argmax(-1)}

    def _logits(self, model: Callable[..., Any], batch: Batch) -> jax.Array:
        named = {'segments': self.segments, 'positions': self.positions}
        given = {k: batch[v] for k, v in named.items() if v is not None}
        return returned.require_array(model(batch[self.tokens], **given), self, 'logits')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """Cross-entropy of a text given another one, summed over the tokens of each text.

    The model is called as `model(inputs, lengths, targets)`, which returns logits (batch, length,
    vocabulary) that may depend on the targets before them, and in evaluation also as
    `model.greedy(inputs, lengths, count)`, which writes int (batch, count) by itself. An answer
    goes up to its first token `end`, that one included; what is behind it does not count. Not for
    ensembles: what their members write has no mean.

    Attributes:
        inputs: batch key of the tokens that are read, int (batch, length).
        lengths: batch key of their number, int (batch,).
        targets: batch key of the answer, int (batch, length).
        end: the token behind an answer.
    """

    inputs: str = 'inputs'
    lengths: str = 'lengths'
    targets: str = 'targets'
    end: int = 0

    @property
    def metrics(self) -> type[clu.metrics.Collection]:
        """loss in nats per answer, and how many answers are right from the first token to the end.

        In evaluation that is the answer which the model writes by itself; in training each of its
        tokens follows the right ones.
        """
        return mean_collection(('loss', 'exact_match'))

    def __call__(self, model: Any, batch: Batch) -> TaskOutput:
        """Returns losses and hits (batch,)."""
        targets = batch[self.targets]
        asked = (batch[self.inputs], batch[self.lengths])
        logits = returned.require_array(model(*asked, targets), self, 'logits').astype(jnp.float32)
        counts = jnp.cumsum(targets == self.end, axis=1) - (targets == self.end) == 0
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        given = logits.argmax(-1) if model.training else model.greedy(*asked, targets.shape[1])
        right = ((given == targets) | ~counts).all(-1)
        vocabulary = logits.shape[-1]
        counted = jnp.where(counts, targets, 0)
        checks = {self.targets: Check(counted, 0, vocabulary - 1, why=_vocabulary_hint(vocabulary))}
        # What does not count may be any number, and its loss NaN.
        loss = jnp.where(counts, loss, 0.0).sum(-1)
        return TaskOutput(loss=loss, metrics={'exact_match': right}, checks=checks)

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns the answer that the model writes, int (batch, length)."""
        count = batch[self.targets].shape[1]
        return {'answer': model.greedy(batch[self.inputs], batch[self.lengths], count)}


def _vocabulary_hint(size: int) -> str:
    return f'The model returns {size} logits: fix the tokens, or its vocab_size'


def _shift_left(x: jax.Array) -> jax.Array:
    return jnp.roll(x, -1, axis=1)
