# SPDX-License-Identifier: Apache-2.0
"""Tasks of language models: next-token prediction, and answers to texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import optax

from trainer.config.errors import UserError
from trainer.modules.ensemble_outputs import mean_softmax
from trainer.tasks import returned
from trainer.tasks.checks import Check
from trainer.tasks.extra_metrics import add_to_means
from trainer.tasks.metrics import broadcast_weights
from trainer.tasks.task import Batch, TaskOutput

_MEANS = ('loss', 'accuracy')
_OUTPUTS = {'loss', 'weights', 'mask', 'accuracy', 'logits', 'labels'}
_ANSWER_MEANS = ('loss', 'accuracy', 'exact_match')


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """Cross-entropy of each token given those before it, for examples of one or more sequences.

    The model is called as `model(tokens)`, for packed sequences as `model(tokens, segments=...,
    positions=...)`, and returns logits (batch, length, vocabulary). Without `targets`, the last
    token of a sequence has no target and weight 0, and so has padding after the last sequence.

    Attributes:
        tokens: batch key of the tokens, int (batch, length).
        targets: batch key of the token after each one, int (batch, length); None for those of
            `tokens`.
        segments: batch key of the number of each token's sequence, int (batch, length), 0 for
            padding; None if each example is one sequence.
        positions: batch key of each token's position in its sequence, int (batch, length), or None.
        weight: batch key of weights, (batch,) or (batch, length), or None.
        fields: batch keys of numbers that metrics read, (batch,) or (batch, length), such as how
            many words an example has.
        extra_metrics: metrics by name, such as `trainer.metrics:Perplexity`. They may read the
            outputs `logits` and `labels`, and `fields`.
    """

    tokens: str = 'tokens'
    targets: str | None = None
    segments: str | None = None
    positions: str | None = None
    weight: str | None = None
    fields: tuple[str, ...] = ()
    extra_metrics: Mapping[str, type[clu.metrics.Metric]] = dataclasses.field(
        default_factory=dict, hash=False
    )

    def __post_init__(self) -> None:
        if isinstance(self.fields, str) or set(self.fields) & _OUTPUTS:
            raise ValueError(
                "fields: expected batch keys, such as ('num_words',), other than the names of "
                f'outputs ({", ".join(sorted(_OUTPUTS))}), got {self.fields!r}'
            )
        if self.targets is not None and self.segments is not None:
            raise ValueError(
                'targets: not available with segments: whether the next token belongs to the same '
                'sequence is read from the segments'
            )
        add_to_means(_MEANS, self.extra_metrics)

    @property
    def metrics(self) -> type[clu.metrics.Collection]:
        """loss in nats, accuracy and extra metrics, over all tokens that have a target."""
        return add_to_means(_MEANS, self.extra_metrics)

    def __call__(self, model: Callable[..., Any], batch: Batch) -> TaskOutput:
        """Returns losses and metrics (batch, length)."""
        tokens = batch[self.tokens]
        logits = self._logits(model, batch).astype(jnp.float32)
        targets = _shift_left(tokens) if self.targets is None else batch[self.targets]
        weights = jnp.ones_like(tokens, jnp.float32)
        if self.segments is not None:
            segments = batch[self.segments]
            # The token after the last one of a packed sequence belongs to another sequence.
            weights = ((segments == _shift_left(segments)) & (segments > 0)).astype(jnp.float32)
        if self.targets is None:
            # `_shift_left` is cyclic: the last target would be the first token.
            weights = weights.at[:, -1].set(0.0)
        if self.weight is not None:
            weights = weights * broadcast_weights(batch[self.weight], weights.shape)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        metrics = {'accuracy': logits.argmax(-1) == targets}
        metrics.update({name: batch[name] for name in self.fields})
        if self.extra_metrics:
            metrics.update(logits=logits, labels=targets)
        # Tokens of weight 0, such as padding of -1, are not checked: 0 is always in range.
        counted = jnp.where(weights != 0, targets, 0)
        vocabulary = logits.shape[-1]
        checked = self.targets or self.tokens
        checks = {checked: Check(counted, 0, vocabulary - 1, why=_vocabulary_hint(vocabulary))}
        return TaskOutput(loss=loss, weights=weights, metrics=metrics, checks=checks)

    def combine(self, logits: jax.Array) -> jax.Array:
        """Returns the logits of the mean of the members' probabilities, for an ensemble.

        Args:
            logits: (members, batch, length, vocabulary).
        """
        return mean_softmax(logits)

    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, jax.Array]:
        """Returns the most probable next token at each position, int (batch, length)."""
        return {'next': self._logits(model, batch).argmax(-1)}

    def _logits(self, model: Callable[..., Any], batch: Batch) -> jax.Array:
        keys = {'segments': self.segments, 'positions': self.positions}
        packing = {name: batch[key] for name, key in keys.items() if key is not None}
        return returned.require_array(model(batch[self.tokens], **packing), self, 'logits')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """Cross-entropy of an answer given a text, summed over the tokens of each answer.

    The model is called as `model(inputs, lengths, targets)` and returns logits (batch, length,
    vocabulary). A model that reads the targets before each (teacher forcing) is given the right
    ones, so it can only find out in another form, `config.evals.NAME.model`, what it makes of its
    own. Predictions are those of `model.greedy(inputs, lengths, count)`, which generates tokens,
    int (batch, count). An answer ends with its first token `end`, inclusive; later tokens are
    ignored. Not supported for ensembles, because generated texts have no mean.

    Attributes:
        inputs: batch key of the input tokens, int (batch, length).
        lengths: batch key of the number of input tokens, int (batch,).
        targets: batch key of the answer, int (batch, length).
        end: the token that ends an answer.
        extra_metrics: metrics by name, such as `trainer.metrics:F1`. They may read the outputs
            `logits`; `answer`, the most probable token of each; and `labels`, -1 after the end of
            an answer.
    """

    inputs: str = 'inputs'
    lengths: str = 'lengths'
    targets: str = 'targets'
    end: int = 0
    extra_metrics: Mapping[str, type[clu.metrics.Metric]] = dataclasses.field(
        default_factory=dict, hash=False
    )

    def __post_init__(self) -> None:
        add_to_means(_ANSWER_MEANS, self.extra_metrics)

    @property
    def metrics(self) -> type[clu.metrics.Collection]:
        """loss in nats per answer, and extra metrics.

        accuracy is the share of its tokens that are right, averaged over the answers; exact_match
        is the share of answers of which all are. With and without teacher forcing, exact_match is
        the same: the tokens before the first wrong one are right.
        """
        return add_to_means(_ANSWER_MEANS, self.extra_metrics)

    def __call__(self, model: Any, batch: Batch) -> TaskOutput:
        """Returns losses and metrics (batch,)."""
        targets = batch[self.targets]
        output = model(batch[self.inputs], batch[self.lengths], targets)
        logits = returned.require_array(output, self, 'logits').astype(jnp.float32)
        # Tokens with no `end` before them: the first `end` itself counts, later tokens do not.
        counts = jnp.cumsum(targets == self.end, axis=1) - (targets == self.end) == 0
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        answer = logits.argmax(-1)
        is_right = (answer == targets) & counts
        vocabulary = logits.shape[-1]
        counted = jnp.where(counts, targets, 0)
        checks = {self.targets: Check(counted, 0, vocabulary - 1, why=_vocabulary_hint(vocabulary))}
        # Ignored tokens can be any number, so their loss can be NaN: select, do not multiply by 0.
        loss = jnp.where(counts, loss, 0.0).sum(-1)
        metrics = {
            # An answer has at least one token, its end.
            'accuracy': is_right.sum(-1) / counts.sum(-1),
            'exact_match': (is_right == counts).all(-1),
        }
        if self.extra_metrics:
            metrics.update(logits=logits, answer=answer, labels=jnp.where(counts, targets, -1))
        return TaskOutput(loss=loss, metrics=metrics, checks=checks)

    def combine(self, logits: Any) -> Any:
        """Raises a UserError, because an ensemble has no common answer."""
        raise UserError(
            'config.ensemble: the members of an ensemble write different answers, which have no '
            'mean. Train one model, or set config.evals = {}'
        )

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns the generated answer, int (batch, length)."""
        count = batch[self.targets].shape[1]
        return {'answer': model.greedy(batch[self.inputs], batch[self.lengths], count)}


def _vocabulary_hint(size: int) -> str:
    return f'The model returns {size} logits: fix the tokens, or the vocab_size of the model'


def _shift_left(x: jax.Array) -> jax.Array:
    return jnp.roll(x, -1, axis=1)
