# SPDX-License-Identifier: Apache-2.0
"""Ways to continue sequences with a model: what `generation.py` and `beam_search.py` call.

Both know no model. They take a function `extend(tokens, cache)`, which continues each example by
tokens (B, L) and returns logits (B, L, V), those of the next token after each, and the new cache:
any pytree, whatever the model keeps from call to call. `with_cache`, `with_own_cache` and
`without_cache` make such a function, or write your own.

B: batch, L: length, V: vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Extend = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


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
    # After `init` of the form that decodes, they contain a cache, for other prompts.
    variables = {name: x for name, x in variables.items() if name != 'cache'}
    first = _init_cache(model, batch, length)
    if not first:
        raise ValueError(
            f'{type(model).__name__} creates no collection cache: pass the form of the model that '
            'decodes, such as model.clone(decode=True), or use without_cache'
        )
    # The dtypes follow the parameters, which may have been cast.
    call = functools.partial(model.apply, mutable=['cache'])
    _, state = jax.eval_shape(call, variables, jnp.zeros((batch, length), jnp.int32))
    cache = jax.tree.map(lambda x, y: x.astype(y.dtype), first, nn.meta.unbox(state['cache']))
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


def with_own_cache(model: Any, batch: int, length: int) -> tuple[Extend, Any]:
    """Returns `extend` and an empty cache for a model that has both, such as a module of NNX.

    Each token then costs the computation of one token.

    Args:
        model: has the methods `empty_cache(batch, length)` and `extend(tokens, cache)`, which
            returns logits (B, L, V) and the new cache, as `trainer.models.transformer_nnx` has
            them. It must not drop units: for NNX, call `model.eval()` first.
        batch: B, the number of prompts.
        length: the number of tokens in the longest prompt and to generate, together.
    """
    return _OwnCall(model.extend, batch, length), model.empty_cache(batch, length)


def feed_singly(extend: Extend) -> Extend:
    """Returns an `extend` that gives the tokens of a prompt to another one, one after the other.

    For models that take one token in a call, as `nn.MultiHeadDotProductAttention(decode=True)`.
    """
    if isinstance(extend, jax.tree_util.Partial):
        return jax.tree_util.Partial(_SingleCalls(extend.func), *extend.args)
    return _SingleCalls(extend)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init_cache(model: nn.Module, batch: int, length: int) -> Any:
    # XLA removes the new parameters.
    created = model.init(jax.random.key(0), jnp.zeros((batch, length), jnp.int32))
    return nn.meta.unbox(created).get('cache', {})


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
class _OwnCall:
    """Calls a method of a model."""

    extend: Extend
    batch: int
    length: int

    def __call__(self, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return self.extend(tokens, cache)


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


def compile_call(
    function: Callable[..., Any], extend: Extend, options: Any, *arguments: Any
) -> Callable[..., Any]:
    """Returns `function(extend, *arguments, options=options)`, compiled for these arguments.

    The program is kept if `extend` is a `jax.tree_util.Partial`, as that of `with_cache`. Otherwise
    it is for this call: `extend` may close over anything.
    """
    if isinstance(extend, jax.tree_util.Partial):
        return functools.partial(_compile(function), extend, options=options)
    # Not `jax.jit`, which would make the arrays of a closure constants of the program: copies of
    # all parameters.
    trace = jax.make_jaxpr(functools.partial(function, extend, options=options), return_shape=True)
    closed, shapes = trace(*arguments)
    tree = jax.tree.structure(shapes)
    run = jax.jit(lambda consts, leaves: jax.core.eval_jaxpr(closed.jaxpr, consts, *leaves))
    return lambda *given: jax.tree.unflatten(tree, run(closed.consts, jax.tree.leaves(given)))


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames='options')


def is_traced(*values: Any) -> bool:
    """Returns whether any array of these trees has no value yet, as within `jax.jit`."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values))


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
    is_known = not isinstance(lengths, jax.core.Tracer)
    with jax.ensure_compile_time_eval():  # Known values are checked within `jax.jit`, too.
        lengths = jnp.asarray(lengths)
        if lengths.shape != (batch,):
            raise ValueError(f'lengths: expected shape {(batch,)}, got {lengths.shape}')
        if is_known and not ((lengths > 0) & (lengths <= length)).all():
            raise ValueError(
                f'lengths: expected numbers from 1 to {length}, got {lengths.tolist()}'
            )
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
    if not isinstance(call, (_LinenCall, _WholeCall, _OwnCall)):
        return
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    counts = [x for path, x in leaves if _is_index(path, x, batch)]
    # Traced numbers are unknown.
    with jax.ensure_compile_time_eval():  # Within `jax.jit`, too.
        known = [int(x.max()) for x in counts if not isinstance(x, jax.core.Tracer)]
    total = length + max(known, default=0)
    if batch != call.batch or total > call.length:
        raise ValueError(
            f'{batch} prompts, {total} tokens with those in the cache and those to generate; but '
            f'the cache is for batch={call.batch}, length={call.length}'
        )
