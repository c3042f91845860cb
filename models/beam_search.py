# SPDX-License-Identifier: Apache-2.0
"""Beam search with any model that predicts the next token: see `decoding.py`.

B: batch, L: length, V: vocabulary, K: beams, N: largest number of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .decoding import (
    Extend,
    as_tokens,
    check_prompt,
    compile_call,
    is_any_of,
    is_traced,
    read_prompt,
)


class Beams(NamedTuple):
    """What `beam_search` returns, the best of each example first.

    Attributes:
        tokens: int (B, K, N); after a stop token, all are `pad`.
        lengths: int (B, K), the number of tokens, the stop token included.
        scores: float32 (B, K), log probabilities divided by the length penalty; -inf, with length
            0, where there are fewer sequences than beams.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


@dataclasses.dataclass(frozen=True)
class _Options:
    count: int
    beams: int
    stop: tuple[int, ...]
    length_penalty: float
    pad: int
    dims: tuple[int | None, ...]  # Of the batch, in each array of the cache.


class _Search(NamedTuple):
    """The search after some tokens.

    Attributes:
        tokens: int (B, K, N), the sequences that are still running.
        log_probs: float32 (B, K), their log probabilities; -inf for none.
        parents: int (B, K), the beam that each of them continues.
        ended: the sequences with a stop token.
    """

    tokens: jax.Array
    log_probs: jax.Array
    parents: jax.Array
    ended: Beams


def beam_search(
    extend: Extend,
    cache: Any,
    prompt: jax.Array,
    *,
    count: int,
    lengths: jax.Array | None = None,
    beams: int = 4,
    stop: int | Sequence[int] = (),
    length_penalty: float = 0.6,
    pad: int = 0,
    batch_dims: Any = None,
) -> Beams:
    """Searches for the most probable continuations of prompts.

    In each step, the K most probable of all sequences with one more token are kept. Those among
    them that end with a stop token are finished. The search for an example ends when K sequences
    have finished and no other can get a better score than the best of them, or after N tokens;
    those that are still running then come after all others. With one beam, it ends with the first
    stop token: the tokens are those of greedy decoding.

    The score of a sequence is its log probability, divided by ((5 + tokens) / 6) to the power of
    `length_penalty` (Wu et al., 2016, https://arxiv.org/abs/1609.08144, equation 14).

    Can be called within `jax.jit`. Outside of it, the program is compiled as in `generate`.

    Args:
        extend: see `generate`; it is also called with the B x K beams as the batch.
        cache: the first cache, for a batch of B.
        prompt: int (B, L), padded at the end.
        count: N, the largest number of tokens.
        lengths: int (B,): see `generate`.
        beams: K, the number of sequences to keep.
        stop: tokens that end a sequence.
        length_penalty: 0 ranks by probability; larger numbers favor longer sequences.
        pad: token after the end of a sequence.
        batch_dims: the dimension of the batch in the arrays of the cache: an integer, from the end
            if it is negative, or a tree of them as `in_axes` of `jax.vmap`, with None for arrays
            without one. By default it is the first or the second dimension, whichever has size B.

    Raises:
        ValueError: if an argument is out of range, or if the dimension of the batch is not clear.
    """
    if beams < 1:
        raise ValueError(f'beams: expected a number > 0, got {beams}')
    prompt, lengths = check_prompt(extend, cache, prompt, lengths, count)
    dims = _find_batch_dims(cache, len(prompt), batch_dims)
    penalty = float(length_penalty)
    options = _Options(int(count), int(beams), as_tokens(stop), penalty, int(pad), dims)
    arguments = (cache, prompt, lengths)
    if is_traced(arguments):  # It becomes a part of the program that is being traced.
        return _search(extend, *arguments, options)
    found: Beams = compile_call(_search, extend, options, *arguments)(*arguments)
    return found


def _search(
    extend: Extend, cache: Any, prompt: jax.Array, lengths: jax.Array | None, options: _Options
) -> Beams:
    batch, count, beams = len(prompt), options.count, options.beams
    logits, cache = read_prompt(extend, cache, prompt, lengths)
    cache = _repeat(cache, options.dims, beams)
    none = jnp.full((batch, beams), -jnp.inf)
    tokens = jnp.full((batch, beams, count), options.pad, prompt.dtype)
    zeros = jnp.zeros((batch, beams), jnp.int32)
    # One beam runs at first: with equal ones, the best K tokens would be K times the same.
    first = _Search(tokens, none.at[:, 0].set(0.0), zeros, Beams(tokens, zeros, none))
    every = jnp.broadcast_to(logits[:, None], (batch, beams, logits.shape[-1]))

    def is_unfinished(carry: Any) -> jax.Array:
        step, search, _ = carry
        return (step < count) & ~_is_done(search, options).all()

    def add(carry: Any) -> Any:
        step, search, cache = carry
        cache = _reorder(cache, options.dims, search.parents)
        last = jax.lax.dynamic_index_in_dim(search.tokens, step - 1, 2, keepdims=False)
        logits, cache = extend(last.reshape(-1, 1), cache)
        logits = logits[:, -1].reshape(batch, beams, -1)
        return step + 1, _extend_search(search, logits, step, options), cache

    carry = (1, _extend_search(first, every, 0, options), cache)
    _, search, _ = jax.lax.while_loop(is_unfinished, add, carry)
    return _rank(search, options)


def _extend_search(
    search: _Search, logits: jax.Array, step: int | jax.Array, options: _Options
) -> _Search:
    """Adds a token to each sequence; logits (B, K, V)."""
    batch, beams, vocabulary = logits.shape
    total = search.log_probs[..., None] + jax.nn.log_softmax(logits.astype(jnp.float32))
    # Enough that K remain of those that do not stop.
    size = min(beams * (1 + len(options.stop)), beams * vocabulary)
    log_probs, best = jax.lax.top_k(total.reshape(batch, -1), size)
    parents, token = best // vocabulary, best % vocabulary
    token = token.astype(search.tokens.dtype)
    tokens = _take(search.tokens, parents).at[:, :, step].set(token)
    is_stop = is_any_of(token, options.stop)

    is_ending = is_stop & (jnp.arange(size) < beams) & ~_is_done(search, options)[:, None]
    scores = jnp.where(is_ending, log_probs / _penalty(step + 1, options), -jnp.inf)
    new = Beams(tokens, jnp.full(scores.shape, step + 1, jnp.int32), scores)
    ended = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), search.ended, new)
    order = jax.lax.top_k(ended.scores, beams)[1]
    ended = jax.tree.map(lambda x: _take(x, order), ended)

    running = jnp.where(is_stop, -jnp.inf, log_probs)
    log_probs, kept = jax.lax.top_k(running, beams)
    tokens, parents = _take(tokens, kept), _take(parents, kept)
    return _Search(tokens, log_probs, parents, ended)


def _is_done(search: _Search, options: _Options) -> jax.Array:
    """Whether nothing would change in the search for an example, bool (B,)."""
    ended, best = search.ended.scores, search.log_probs.max(1)
    is_full = (ended > -jnp.inf).all(1)
    if options.beams > 1:
        # Unlikely sequences are often short: if K of them were enough, a much better one that ends
        # later would be lost. Log probabilities only decrease, so this is the best possible score.
        bound = best / jnp.maximum(_penalty(1, options), _penalty(options.count, options))
        is_full &= bound <= ended.max(1)
    return is_full | (best == -jnp.inf)


def _rank(search: _Search, options: _Options) -> Beams:
    """Returns the sequences that have ended, and after them those that are still running."""
    is_there = search.log_probs > -jnp.inf
    running = Beams(
        jnp.where(is_there[..., None], search.tokens, options.pad),
        jnp.where(is_there, options.count, 0),
        search.log_probs / _penalty(options.count, options),
    )
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), search.ended, running)
    is_ended = jnp.arange(2 * options.beams) < (search.ended.scores > -jnp.inf).sum(1)[:, None]
    # Both halves are sorted: the best score first.
    is_empty = (jnp.arange(2 * options.beams) < options.beams) & ~is_ended
    order = jnp.argsort(is_empty, axis=1, stable=True)[:, : options.beams]
    return jax.tree.map(lambda x: _take(x, order), both)


def _penalty(length: int | jax.Array, options: _Options) -> jax.Array:
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** options.length_penalty


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
    """Returns x (B, I, ...) in the order of the indices (B, J) along its second dimension."""
    return jax.vmap(lambda x, order: x[order])(x, order)


def _repeat(cache: Any, dims: tuple[int | None, ...], beams: int) -> Any:
    """Returns the cache of a batch with each example K times."""
    return _map(lambda x, dim: jnp.repeat(x, beams, axis=dim), cache, dims)


def _reorder(cache: Any, dims: tuple[int | None, ...], parents: jax.Array) -> Any:
    """Returns the cache whose beams continue the beams `parents` (B, K)."""
    batch, beams = parents.shape

    def reorder(x: jax.Array, dim: int) -> jax.Array:
        split = x.reshape(*x.shape[:dim], batch, beams, *x.shape[dim + 1 :])
        # Example by example, so that no device needs those of others.
        take = jax.vmap(lambda x, order: jnp.take(x, order, axis=dim), (dim, 0), dim)
        return take(split, parents).reshape(x.shape)

    return _map(reorder, cache, dims)


def _map(
    function: Callable[[jax.Array, int], jax.Array], cache: Any, dims: tuple[int | None, ...]
) -> Any:
    """Returns the cache with changed arrays, but for those without a batch."""
    leaves, tree = jax.tree_util.tree_flatten(cache)
    pairs = zip(leaves, dims, strict=True)
    new = [x if dim is None else function(x, dim) for x, dim in pairs]
    return jax.tree_util.tree_unflatten(tree, new)


def _find_batch_dims(cache: Any, batch: int, given: Any) -> tuple[int | None, ...]:
    """Returns the dimension of the batch in each array of the cache, None for arrays without."""
    if given is not None:
        spread = jax.tree.broadcast(given, cache, is_leaf=lambda x: x is None)
        dims = jax.tree.leaves(spread, is_leaf=lambda x: x is None)
        leaves = jax.tree_util.tree_leaves_with_path(cache)
        return tuple(_check_dim(*leaf, dim, batch) for leaf, dim in zip(leaves, dims, strict=True))
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(cache):
        dims = [dim for dim in range(min(x.ndim, 2)) if x.shape[dim] == batch]
        if len(dims) > 1:
            raise ValueError(
                f'cache{jax.tree_util.keystr(path)} has the shape {x.shape}: which dimension is '
                f'that of the batch, {batch}? Pass batch_dims, such as 0, or another batch size'
            )
        found.append(dims[0] if dims else None)
    return tuple(found)


def _check_dim(path: Any, x: jax.Array, dim: int | None, batch: int) -> int | None:
    """Returns the dimension of the batch in an array of the cache, counted from the first."""
    if dim is None:
        return None
    if not -x.ndim <= dim < x.ndim or x.shape[dim] != batch:
        raise ValueError(
            f'batch_dims: cache{jax.tree_util.keystr(path)} has the shape {x.shape}, and its '
            f'dimension {dim} is not that of the batch, {batch}'
        )
    return dim % x.ndim
