# SPDX-License-Identifier: Apache-2.0
"""The task of an evaluation that generates text with a language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.errors import UserError
from trainer.modules.ensemble_outputs import mean_softmax
from trainer.tasks.task import Batch

_ADVICE = (
    'Set evals.NAME.model to the form that decodes, such as dict(decode=True); or, for a model '
    "without one, decoder of the task to dict(ref='trainer.models.decoding:without_cache')"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """Continues the beginning of each example, for `trainer.scores:Samples` or a score of your own.

    A task without a loss, for an evaluation whose model is the form that decodes:
    `evals.NAME.model=dict(decode=True)`. The model is called as `model(tokens)`, which returns
    logits (batch, length, vocabulary) of the token after each, and continues the tokens of the call
    before. In an ensemble, only a decoder without a cache works: the tokens are those of the mean
    of the members' probabilities.

    Each example draws its own random numbers, others in each evaluation. They depend on its place
    in the batch, but not on the other examples or on the number of devices.

    Attributes:
        generate: function that generates tokens: `trainer.models.generation:generate`, or another
            with its signature.
        count: number of tokens to generate.
        inputs: batch key of the tokens to continue, int (batch, length).
        prompt: how many of these tokens to read; by default all.
        lengths: batch key of the number of tokens of each example, int (batch,); by default all
            have the same. The cache then needs an entry `index`: see `generate`.
        decoder: None for the cache of a Linen model; `trainer.models.decoding:with_own_cache` for
            a model with methods for its cache, or `without_cache` for any other.
        temperature: divisor of the logits; 0 for the most probable token.
        top_k: draw from so many tokens only; 0 for all.
        top_p: draw from the most probable tokens only, whose probabilities sum to p.
        stop: tokens that end a text.
        pad: token after the end of a text.
    """

    generate: Callable[..., Any]
    count: int = 64
    inputs: str = 'inputs'
    prompt: int | None = None
    lengths: str | None = None
    decoder: Callable[..., Any] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    pad: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(
                'temperature: expected 0 for the most probable token, or a number > 0, got '
                f'{self.temperature}'
            )

    def combine(self, logits: jax.Array) -> jax.Array:
        """Returns the logits of the mean of the members' probabilities, for an ensemble.

        Args:
            logits: (members, batch, length, vocabulary).
        """
        return mean_softmax(logits)

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns prompts and what follows, padded at the end.

        `prompt` int (batch, length) with `prompt_length` (batch,), and `generated` int (batch,
        count) with `length` (batch,), the stop token included.

        Raises:
            UserError: if the model has no cache, or an argument is out of range: with `count` more
                tokens, for example, a prompt may be longer than the model allows.
        """
        prompt = batch[self.inputs][:, : self.prompt]
        rows, total = prompt.shape
        lengths = jnp.full(rows, total)
        if self.lengths is not None:
            lengths = jnp.minimum(batch[self.lengths], total)
        make = self.decoder or _use_cache
        try:
            tokens, generated = self.generate(
                *make(model, rows, total + self.count),
                prompt,
                count=self.count,
                lengths=None if self.lengths is None else lengths,
                key=model.rng('sample') if self.temperature else None,
                temperature=self.temperature or 1.0,
                top_k=self.top_k,
                top_p=self.top_p,
                stop=self.stop,
                pad=self.pad,
            )
        except ValueError as error:
            raise UserError(
                f'Continuation: a prompt of {total} tokens (those of {self.inputs!r}, of which '
                f'prompt={self.prompt}) and count={self.count} more: {error}'
            ) from error
        found = {'generated': tokens, 'length': generated}
        return {'prompt': prompt, 'prompt_length': lengths, **found}


def _use_cache(model: Any, batch: int, length: int) -> tuple[Callable[..., Any], Any]:
    """Returns a function from tokens and cache to logits and cache, and the empty cache."""

    def extend(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        decoder = model.with_collections(cache=cache)
        logits = decoder(tokens)
        return logits, decoder.collections['cache']

    try:
        cache = model.fresh_collections(jnp.zeros((batch, length), jnp.int32)).get('cache')
    except UserError as error:
        raise UserError(f'Continuation: {error}. {_ADVICE}') from error
    if not cache:
        raise UserError(f'Continuation: the model has no collection cache. {_ADVICE}')
    return extend, cache
