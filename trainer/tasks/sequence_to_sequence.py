# SPDX-License-Identifier: Apache-2.0
"""The task of models that write a target sequence for a source sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp

from trainer.config.errors import UserError
from trainer.modules.ensemble_outputs import mean_softmax
from trainer.tasks import returned
from trainer.tasks.checks import Check
from trainer.tasks.extra_metrics import add_to_means
from trainer.tasks.task import Batch, TaskOutput

_MEANS = ('loss', 'accuracy')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceToSequence:
    """Cross-entropy of each token of a target, given its source and the tokens before it.

    The model is called as `model(sources, inputs)`, where the inputs are the start token and the
    target without its last token, and returns logits (batch, length, vocabulary): those of each
    token of the target.

    With `search`, `predict` writes targets. It needs a form of the model that keeps what it has
    computed in a collection 'cache': `evals.NAME.model=dict(decode=True)`. The model is then called
    as `model.encode(sources)`, and for each token as `model.extend(inputs, encoded)`, which
    continues the inputs of the calls before, as in `models/translator.py`. Not in an ensemble,
    whose members encode a source differently: its loss is that of the mean of their probabilities,
    but it writes no targets.

    Attributes:
        sources: batch key of the source tokens, int (batch, length).
        targets: batch key of the target tokens, int (batch, length), with the end token.
        padding: the token after the end of a source or target; the model must know that of sources.
        start: the token before each target.
        end: the token that ends a target.
        label_smoothing: mass moved from the label to all tokens in training, in [0, 1). The loss of
            an evaluation is without, so that it is comparable, and exp of it is the perplexity.
        search: function that searches for targets: `trainer.models.beam_search:beam_search`, or
            another with its signature; None for a task without predictions of targets.
        beams: number of targets of each source that the search keeps.
        length_penalty: exponent of the length by which the search divides log probabilities.
        extra_tokens: how many more tokens than its padded source a written target may have.
        keep: batch keys of fields that `predict` returns, too, such as the texts.
        extra_metrics: metrics by name, such as `trainer.metrics:Perplexity`. They may read the
            outputs `logits` and `labels`, the targets, of which padding has weight 0.
    """

    sources: str = 'sources'
    targets: str = 'targets'
    padding: int = 0
    start: int = 0
    end: int = 1
    label_smoothing: float = 0.0
    search: Callable[..., Any] | None = None
    beams: int = 4
    length_penalty: float = 0.6
    extra_tokens: int = 50
    keep: tuple[str, ...] = ()
    extra_metrics: Mapping[str, type[clu.metrics.Metric]] = dataclasses.field(
        default_factory=dict, hash=False
    )

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f'label_smoothing: expected a number from 0 to below 1, got {self.label_smoothing}'
            )
        if self.beams < 1 or self.extra_tokens < 0:
            raise ValueError(
                'beams, extra_tokens: expected at least one beam, and a number of tokens that is '
                f'not negative, got {self.beams} and {self.extra_tokens}'
            )
        if not isinstance(self.keep, tuple) or {'tokens', 'score'} & set(self.keep):
            raise ValueError(
                'keep: expected a tuple of batch keys other than tokens and score, got '
                f'{self.keep!r}'
            )
        add_to_means(_MEANS, self.extra_metrics)

    @property
    def metrics(self) -> type[clu.metrics.Collection]:
        """loss in nats per token, accuracy and extra metrics, over all tokens but padding."""
        return add_to_means(_MEANS, self.extra_metrics)

    def __call__(self, model: Any, batch: Batch) -> TaskOutput:
        """Returns losses and metrics (batch, length)."""
        targets = batch[self.targets]
        is_token = targets != self.padding
        # Padding may be any number: it needs neither a logit nor an embedding.
        labels = jnp.where(is_token, targets, 0)
        starts = jnp.full((len(targets), 1), self.start, targets.dtype)
        inputs = jnp.concatenate([starts, labels[:, :-1]], axis=1)
        output = model(batch[self.sources], inputs)
        logits = returned.require_array(output, self, 'logits').astype(jnp.float32)
        loss = _cross_entropy(logits, labels, self.label_smoothing if model.training else 0.0)
        metrics = {'accuracy': logits.argmax(-1) == labels}
        if self.extra_metrics:
            metrics.update(logits=logits, labels=labels)
        vocabulary = logits.shape[-1]
        why = f'The model returns {vocabulary} logits: fix the tokens, or its vocab_size'
        checks = {self.targets: Check(labels, 0, vocabulary - 1, why=why)}
        weights = is_token.astype(jnp.float32)
        return TaskOutput(loss=loss, weights=weights, metrics=metrics, checks=checks)

    def combine(self, logits: jax.Array) -> jax.Array:
        """Returns the logits of the mean of the members' probabilities, for an ensemble.

        Args:
            logits: (members, batch, length, vocabulary).
        """
        return mean_softmax(logits)

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns the best target of each source, and `keep`.

        `tokens` int (batch, length) are those of the target, with padding after its end; `score`
        (batch,) is the log probability divided by the length penalty.

        Raises:
            UserError: if there is no `search`, the model keeps no cache, or this is an ensemble.
        """
        if self.search is None:
            raise UserError(
                'SequenceToSequence: predictions need a search: set search of the task of this '
                "evaluation to dict(ref='trainer.models.beam_search:beam_search')"
            )
        sources = batch[self.sources]
        count = sources.shape[1] + self.extra_tokens
        # Before the encoder: an ensemble, which has no cache, would return the mean of encodings.
        cache = self._empty_cache(model, sources, count)
        encoded = model.encode(sources)
        # The first call of the search is with one sequence of each source, all others with all
        # beams: they are not repeated again for each token.
        repeated = jax.tree.map(lambda x: jnp.repeat(x, self.beams, axis=0), encoded)

        def extend(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            decoder = model.with_collections(cache=cache)
            logits = decoder.extend(tokens, encoded if len(tokens) == len(sources) else repeated)
            return logits, decoder.collections['cache']

        found = self.search(
            extend,
            cache,
            jnp.full((len(sources), 1), self.start, sources.dtype),
            count=count,
            beams=self.beams,
            stop=self.end,
            length_penalty=self.length_penalty,
            pad=self.padding,
            batch_dims=0,
        )
        kept = {name: batch[name] for name in self.keep}
        return {'tokens': found.tokens[:, 0], 'score': found.scores[:, 0], **kept}

    def _empty_cache(self, model: Any, sources: jax.Array, count: int) -> Any:
        # As long as all tokens that are read: the start token, and all but the last that is found.
        inputs = jnp.zeros((len(sources), count), sources.dtype)
        try:
            cache = model.fresh_collections(sources, inputs).get('cache')
        except UserError as error:
            raise UserError(f'SequenceToSequence: {error}') from error
        if not cache:
            raise UserError(
                'SequenceToSequence: the model has no collection cache: set evals.NAME.model to '
                'the form that decodes, such as dict(decode=True)'
            )
        return cache


def _cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Returns losses (batch, length), with a part of the mass of the label on all tokens."""
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    if not smoothing:
        return log_sum - label
    # Without an array of the smoothed labels, which would be as large as the logits.
    return log_sum - (1 - smoothing) * label - smoothing * logits.mean(-1)
