# SPDX-License-Identifier: Apache-2.0
"""Generates tokens with any model that predicts the next one, for a batch of prompts.

The functions know no model. They take a function `extend(tokens, cache)`, which continues each
example by tokens (B, L) and returns logits (B, L, V), those of the next token after each, and the
new cache: any pytree, whatever the model keeps from call to call. `with_cache` and `without_cache`
make such a function, or write your own: for a module of NNX it is a few lines. `beam_search.py`
takes the same.

B: batch, L: length, V: vocabulary, N: number of tokens to generate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Extend = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


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
    arguments = (extend, cache, prompt, lengths, sampling)
    if callback is not None:
        return _stream(*arguments, options, callback)
    # A closure cannot be the argument of a compiled function.
    is_argument = isinstance(extend, jax.tree_util.Partial)
    return (_generate_compiled if is_argument else _generate)(*arguments, options)


def with_cache(
    model: nn.Module, variables: Any, batch: int, length: int
) -> tuple[jax.tree_util.Partial, Any]:
    """Returns `extend` and an empty cache for a Linen module with a collection 'cache'.

    Each token then costs the computation of one token.

    Args:
        model: the form of the model that decodes, such as `model.clone(decode=True)`. It is called
            with tokens (B, L) and returns logits (B, L, V).
        variables: those of the trained model, as in {'params': ...}.
        batch: B, the number of prompts.
        length: the number of tokens in the longest prompt and to generate, together.

    Raises:
        ValueError: if the model has no cache.
    """
    tokens = jnp.zeros((batch, length), jnp.int32)
    # After `init` of the form that decodes, they contain a cache, for other prompts.
    variables = {name: x for name, x in variables.items() if name != 'cache'}
    # Not from `init`, which would create new parameters, perhaps of another dtype.
    call = functools.partial(model.apply, mutable=['cache'])
    _, state = jax.eval_shape(call, variables, tokens)
    if not state.get('cache'):
        raise ValueError(
            f'{type(model).__name__} creates no collection cache: pass the form of the model that '
            'decodes, such as model.clone(decode=True), or use without_cache'
        )
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.meta.unbox(state['cache']))
    return jax.tree_util.Partial(_LinenCall(model, batch, length), variables), cache


def without_cache(
    predict: Callable[[jax.Array], jax.Array], batch: int, length: int
) -> tuple[Extend, Any]:
    """Returns `extend` and an empty cache for any function that predicts next tokens.

    The cache is the tokens so far, and each call computes all of them again. It works for any
    model, and takes longer, the more tokens there are.

    Args:
        predict: from tokens (B, length) to logits (B, length, V) of the next token after each,
            which depend on no later tokens.
        batch: B, the number of prompts.
        length: the number of tokens in the longest prompt and to generate, together.
    """
    cache = {'tokens': jnp.zeros((batch, length), jnp.int32), 'index': jnp.zeros(batch, jnp.int32)}
    return _WholeCall(predict, batch, length), cache


def feed_singly(extend: Extend) -> Extend:
    """Returns an `extend` that gives the tokens of a prompt to another one, one after the other.

    For models that take one token in a call, as `nn.MultiHeadDotProductAttention(decode=True)`.
    """
    if isinstance(extend, jax.tree_util.Partial):
        return jax.tree_util.Partial(_SingleCalls(extend.func), *extend.args)
    return _SingleCalls(extend)


@dataclasses.dataclass(frozen=True)
class _LinenCall:
    """Calls a Linen module. Equal ones share a compiled program."""

    model: nn.Module
    batch: int
    length: int

    def __call__(self, variables: Any, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        given = {**variables, 'cache': cache}
        logits, state = self.model.apply(given, tokens, mutable=['cache'])
        return logits, nn.meta.unbox(state['cache'])


@dataclasses.dataclass(frozen=True)
class _WholeCall:
    """Calls a function with all tokens so far."""

    predict: Callable[[jax.Array], jax.Array]
    batch: int
    length: int

    def __call__(self, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        positions = cache['index'][:, None] + jnp.arange(tokens.shape[1])
        rows = jnp.arange(len(tokens))[:, None]  # Beams are a larger batch.
        before = cache['tokens'].at[rows, positions].set(tokens, mode='drop')
        logits = self.predict(before)[rows, positions]
        return logits, {'tokens': before, 'index': cache['index'] + tokens.shape[1]}


@dataclasses.dataclass(frozen=True)
class _SingleCalls:
    """Calls another function once for each token; the last two arguments are tokens and cache."""

    call: Callable[..., Any]

    def __call__(self, *args: Any) -> tuple[jax.Array, Any]:
        *given, tokens, cache = args

        def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
            logits, cache = self.call(*given, token[:, None], cache)
            return cache, logits[:, 0]

        cache, logits = jax.lax.scan(step, cache, tokens.T)
        return jnp.moveaxis(logits, 0, 1), cache


def read_prompt(
    extend: Extend, cache: Any, prompt: jax.Array, lengths: jax.Array | None
) -> tuple[jax.Array, Any]:
    """Returns the logits (B, V) after each prompt, and the cache."""
    if lengths is None:
        logits, cache = extend(prompt, cache)
        return logits[:, -1], cache
    # Padding may be any number: the embedding of one that is no token can be NaN, and so would be
    # its product with an attention weight of 0.
    prompt = jnp.where(jnp.arange(prompt.shape[1]) < lengths[:, None], prompt, 0)
    logits, cache = extend(prompt, cache)
    padding = prompt.shape[1] - lengths

    # Later tokens overwrite the padding; until then they do not attend to it.
    def without_padding(path: Any, x: jax.Array) -> jax.Array:
        return x - padding.astype(x.dtype) if _is_index(path, x, len(prompt)) else x

    cache = jax.tree_util.tree_map_with_path(without_padding, cache)
    return logits[jnp.arange(len(prompt)), lengths - 1], cache


def _is_index(path: Any, x: jax.Array, batch: int) -> bool:
    # Layers that are stacked have one each.
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return name == 'index' and x.shape[-1:] == (batch,)


def is_any_of(tokens: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    """Returns whether each token is one of `stop`, of the shape of the tokens."""
    return jnp.isin(tokens, jnp.asarray(stop, tokens.dtype))


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


_compile = functools.partial(jax.jit, static_argnames='options')
_generate_compiled = _compile(_generate)


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
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((prompt, cache))):
        raise ValueError(
            'callback: tokens have no values within jax.jit or another transformation of JAX; call '
            'generate outside of it, or without a callback'
        )
    start: Callable[..., _State] = functools.partial(_start_compiled, extend)
    advance: Callable[..., _State] = functools.partial(_advance_compiled, extend)
    if not isinstance(extend, jax.tree_util.Partial):  # A closure cannot be an argument.
        start = _compile(functools.partial(_start, extend))
        advance = _compile(functools.partial(_advance, extend))
    state = start(cache, prompt, lengths, sampling, options)
    tokens = np.full((len(prompt), options.count), options.pad, prompt.dtype)
    counts, was_running = np.zeros(len(prompt), np.int32), np.ones(len(prompt), bool)
    for step in range(options.count):
        # Before the wait for this token: the devices compute while the callback runs.
        following = state
        if step + 1 < options.count:
            following = advance(state, step + 1, sampling, options)
        tokens[:, step], is_running = np.asarray(state.token), np.asarray(state.is_running)
        counts += was_running
        callback(tokens[:, step].copy(), was_running)
        if not is_running.any():
            break
        state, was_running = following, is_running
    return Generated(jnp.asarray(tokens), jnp.asarray(counts))


_start_compiled, _advance_compiled = _compile(_start), _compile(_advance)


def as_tokens(stop: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the stop tokens as a tuple."""
    return tuple(int(token) for token in np.ravel(stop))


def check_prompt(
    extend: Extend, cache: Any, prompt: jax.Array, lengths: jax.Array | None, count: int
) -> tuple[jax.Array, jax.Array | None]:
    """Checks the prompts; returns them and their lengths as arrays of JAX, int32."""
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            f'prompt: expected integers of shape (batch, length), got {prompt.dtype} of shape '
            f'{prompt.shape}'
        )
    prompt = prompt.astype(jnp.int32)  # In bytes, for example, generated tokens might not fit.
    batch, length = prompt.shape
    if not (length and count > 0):
        raise ValueError(
            f'expected at least one token in the prompt and to generate, got {length} and '
            f'count={count}'
        )
    _check_room(extend, cache, batch, length + count)
    if lengths is None:
        return prompt, None
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,):
        raise ValueError(f'lengths: expected shape {(batch,)}, got {lengths.shape}')
    if not isinstance(lengths, jax.core.Tracer) and not ((lengths > 0) & (lengths <= length)).all():
        raise ValueError(f'lengths: expected numbers from 1 to {length}, got {lengths.tolist()}')
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    if not any(_is_index(path, x, batch) for path, x in leaves):
        raise ValueError(
            f'lengths: prompts of different lengths need a cache with an entry `index`, int '
            f'{(batch,)}, the number of tokens that it has of each prompt; this one has none. '
            'Generate for prompts of one length at a time, without lengths'
        )
    return prompt, lengths


def _check_room(extend: Extend, cache: Any, batch: int, length: int) -> None:
    """Checks that the cache is for this batch, and that so many tokens fit into it.

    Tokens beyond the end of a cache would be lost without a word.
    """
    call = extend.func if isinstance(extend, jax.tree_util.Partial) else extend
    call = call.call if isinstance(call, _SingleCalls) else call
    if not isinstance(call, (_LinenCall, _WholeCall)):
        return
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    counts = [x for path, x in leaves if _is_index(path, x, batch)]
    # Traced numbers are unknown.
    known = [int(x.max()) for x in counts if not isinstance(x, jax.core.Tracer)]
    total = length + max(known, default=0)
    if batch != call.batch or total > call.length:
        raise ValueError(
            f'{batch} prompts, {total} tokens with those in the cache and those to generate; but '
            f'the cache is for batch={call.batch}, length={call.length}'
        )


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
