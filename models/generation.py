# SPDX-License-Identifier: Apache-2.0
"""Generates tokens with any model that predicts the next one, for a batch of prompts.

The model is a function `extend(tokens, cache)` with its first cache: see `decoding.py`.

B: batch, L: length, V: vocabulary, N: number of tokens to generate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .decoding import (
    Extend,
    as_tokens,
    check_prompt,
    compile_call,
    is_any_of,
    is_traced,
    read_prompt,
)


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: int (B, N); after a stop token, all are `pad`.
        lengths: int (B,), the number of generated tokens, the stop token included.
    """

    tokens: jax.Array
    lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is the same for all tokens, and not an array."""

    count: int
    top_k: int
    top_p: float
    stop: tuple[int, ...]
    pad: int


class _Sampling(NamedTuple):
    """How tokens are drawn.

    Attributes:
        keys: random keys (B,), one for each example; None for the most probable tokens.
        temperature: divisor of the logits, float32 ().
    """

    keys: jax.Array | None
    temperature: jax.Array


class _State(NamedTuple):
    """The state between two calls of the model.

    Attributes:
        cache: of all tokens but the last.
        token: int (B,), the last token.
        is_running: bool (B,), whether there was no stop token yet.
    """

    cache: Any
    token: jax.Array
    is_running: jax.Array


def generate(
    extend: Extend,
    cache: Any,
    prompt: jax.Array,
    *,
    count: int,
    lengths: jax.Array | None = None,
    key: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: int | Sequence[int] = (),
    pad: int = 0,
    callback: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> Generated:
    """Generates tokens that continue prompts.

    Without a key, each is the most probable one (greedy decoding). With a key, tokens are drawn,
    and each example has its own random numbers, so that they do not depend on the rest of the batch
    or on the devices. (Keys of the kind 'rbg' do depend on the size of the batch.)

    Can be called within `jax.jit`. Outside of it, the program is compiled once for each model of
    `with_cache`, number of tokens and shape of the prompts; for other functions, in each call.

    Args:
        extend: from tokens (B, L) and a cache to logits (B, L, V) and the new cache.
        cache: the first cache; it may contain tokens before those of the prompts.
        prompt: int (B, L), padded at the end.
        count: N, the number of tokens to generate.
        lengths: int (B,), at least 1: the tokens in each prompt; None if all are L. The cache then
            needs an entry `index`, int (B,), the number of tokens that it has of each example.
        key: random key, or keys (B,), one for each example.
        temperature: divisor of the logits in sampling; greater than 0.
        top_k: draw from the tokens with the k largest logits only (and those equal to the k-th);
            0 for all.
        top_p: draw from the most probable tokens only: as many as are needed for a sum of p.
        stop: tokens that end an example.
        pad: token after the end of an example.
        callback: called after each token with arrays of numpy: the tokens (B,), and whether each
            example was still running (B,), False if the token is padding. The model computes the
            next tokens meanwhile. Not within `jax.jit`, nor in a run of several processes.

    Raises:
        ValueError: if an argument is out of range, if prompts of different lengths are given for
            a cache that has no `index`, or a callback within `jax.jit`.
    """
    options = _Options(int(count), int(top_k), float(top_p), as_tokens(stop), int(pad))
    prompt, lengths = check_prompt(extend, cache, prompt, lengths, count)
    _check_sampling(temperature, options)
    keys = None if key is None else _split(key, len(prompt))
    # An array, so that the numbers 1 and 1.0 share a program.
    sampling = _Sampling(keys, jnp.asarray(temperature, jnp.float32))
    arguments = (cache, prompt, lengths, sampling)
    if callback is not None:
        return _stream(extend, *arguments, options, callback)
    if is_traced(arguments):  # It becomes a part of the program that is being traced.
        return _generate(extend, *arguments, options)
    generated: Generated = compile_call(_generate, extend, options, *arguments)(*arguments)
    return generated


def _generate(
    extend: Extend,
    cache: Any,
    prompt: jax.Array,
    lengths: jax.Array | None,
    sampling: _Sampling,
    options: _Options,
) -> Generated:
    state = _start(extend, cache, prompt, lengths, sampling, options)
    tokens = jnp.full((len(prompt), options.count), options.pad, prompt.dtype)
    ones = jnp.ones(len(prompt), jnp.int32)

    def is_unfinished(carry: Any) -> jax.Array:
        step, _, _, state = carry
        return (step < options.count) & state.is_running.any()

    def add(carry: Any) -> Any:
        step, tokens, counts, state = carry
        counts += state.is_running
        state = _advance(extend, state, step, sampling, options)
        return step + 1, tokens.at[:, step].set(state.token), counts, state

    first = (1, tokens.at[:, 0].set(state.token), ones, state)
    _, tokens, counts, _ = jax.lax.while_loop(is_unfinished, add, first)
    return Generated(tokens, counts)


def _start(
    extend: Extend,
    cache: Any,
    prompt: jax.Array,
    lengths: jax.Array | None,
    sampling: _Sampling,
    options: _Options,
) -> _State:
    logits, cache = read_prompt(extend, cache, prompt, lengths)
    token = _choose(logits, 0, sampling, options).astype(prompt.dtype)
    return _State(cache, token, ~is_any_of(token, options.stop))


def _advance(
    extend: Extend,
    state: _State,
    step: int | jax.Array,
    sampling: _Sampling,
    options: _Options,
) -> _State:
    logits, cache = extend(state.token[:, None], state.cache)
    chosen = _choose(logits[:, -1], step, sampling, options)
    token = jnp.where(state.is_running, chosen, options.pad).astype(state.token.dtype)
    return _State(cache, token, state.is_running & ~is_any_of(token, options.stop))


def _split(key: jax.Array, batch: int) -> jax.Array:
    """Returns a key for each example (B,)."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # An array of numbers, as of `jax.random.PRNGKey`.
    if not key.ndim:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f'key: expected one, or one for each of {batch} prompts, got {key.shape}')
    return key


def _choose(
    logits: jax.Array,
    step: int | jax.Array,
    sampling: _Sampling,
    options: _Options,
) -> jax.Array:
    """Returns the next tokens, int (B,), for logits (B, V)."""
    logits = logits.astype(jnp.float32)
    if sampling.keys is None:
        return logits.argmax(-1)
    kept = keep_probable(logits / sampling.temperature, options.top_k, options.top_p)
    keys = jax.vmap(jax.random.fold_in, (0, None))(sampling.keys, step)
    return jax.vmap(jax.random.categorical)(keys, kept)


def keep_probable(logits: jax.Array, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
    """Returns logits (..., V) that are -inf for all but the most probable tokens.

    Args:
        logits: (..., V).
        top_k: keep the k largest; 0 for all.
        top_p: of these, keep the smallest number whose probabilities sum to at least p.

    Tokens that are as probable as the last of those kept are kept, too.
    """
    vocabulary = logits.shape[-1]
    size = min(top_k or vocabulary, vocabulary)
    if size == vocabulary and top_p >= 1:
        return logits
    largest, _ = jax.lax.top_k(logits, size)
    smallest = largest[..., -1:]
    if top_p < 1:
        probabilities = jax.nn.softmax(largest)
        before = jnp.cumsum(probabilities, -1) - probabilities
        smallest = jnp.where(before < top_p, largest, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def _stream(
    extend: Extend,
    cache: Any,
    prompt: jax.Array,
    lengths: jax.Array | None,
    sampling: _Sampling,
    options: _Options,
    callback: Callable[[np.ndarray, np.ndarray], None],
) -> Generated:
    """Generates the same in a loop on the host, which calls the callback after each token."""
    arguments = (cache, prompt, lengths, sampling)
    state = compile_call(_start, extend, options, *arguments)(*arguments)
    # Also if only parameters are traced, which a closure may contain.
    if is_traced(state.token):
        raise ValueError(
            'callback: tokens have no values within jax.jit or another transformation of JAX; call '
            'generate outside of it, or without a callback'
        )
    advance = compile_call(_advance, extend, options, state, jnp.int32(1), sampling)
    tokens = np.full((len(prompt), options.count), options.pad, prompt.dtype)
    counts, was_running = np.zeros(len(prompt), np.int32), np.ones(len(prompt), bool)
    for step in range(options.count):
        # Before the wait for this token: the devices compute while the callback runs.
        following = state
        if step + 1 < options.count:
            following = advance(state, jnp.int32(step + 1), sampling)
        tokens[:, step], is_running = np.asarray(state.token), np.asarray(state.is_running)
        counts += was_running
        callback(tokens[:, step].copy(), was_running)
        if not is_running.any():
            break
        state, was_running = following, is_running
    return Generated(jnp.asarray(tokens), jnp.asarray(counts))


def _check_sampling(temperature: float | jax.Array, options: _Options) -> None:
    if np.ndim(temperature):
        raise ValueError(f'temperature: expected one number, got shape {np.shape(temperature)}')
    # A traced temperature has no value yet.
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(
            f'temperature: expected a number > 0, got {temperature}; for the most probable tokens '
            'omit key'
        )
    if options.top_k < 0:
        raise ValueError(f'top_k: expected 0 for all tokens, or a number > 0, got {options.top_k}')
    if not 0 < options.top_p <= 1:
        raise ValueError(f'top_p: expected a probability > 0, at most 1, got {options.top_p}')
