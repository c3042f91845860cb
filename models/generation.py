# SPDX-License-Identifier: Apache-2.0
"""Text generation with a trained language model, token by token."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .transformer import Transformer


def generate(
    model: Transformer,
    params: Any,
    prompt: jax.Array,
    count: int,
    *,
    key: jax.Array | None = None,
    temperature: float = 1.0,
) -> jax.Array:
    """Generates tokens that continue a prompt, int (batch, count).

    Keys and values are cached, so each token costs one token's computation. Compiled once for each
    model, number of tokens and shape of the prompt.

    Args:
        model: the model as it was trained.
        params: parameters of the model.
        prompt: int (batch, length), at least one token each.
        count: number of tokens to generate.
        key: random key for sampling; None selects the most probable token (greedy decoding).
        temperature: divisor of the logits in sampling; greater than 0.

    Raises:
        ValueError: if prompt and generated tokens are longer than `model.max_length`, if either is
            empty, if the prompt is not of two dimensions, or if the temperature is not positive.
    """
    if prompt.ndim != 2:
        raise ValueError(f'prompt: expected shape (batch, length), got {prompt.shape}')
    if not (prompt.shape[1] and count > 0):
        raise ValueError(
            f'expected at least one token in the prompt and to generate, got {prompt.shape[1]} and '
            f'count={count}'
        )
    total = prompt.shape[1] + count
    if total > model.max_length:
        raise ValueError(f'{total} tokens with the prompt, but max_length is {model.max_length}')
    # A traced temperature has no value yet.
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(
            f'temperature: expected a number > 0, got {temperature}; for the most probable tokens '
            'omit key'
        )
    # Modules are hashable if their fields are, so equal models share a compiled program.
    return _generate(model.clone(decode=True), params, prompt, count, key, temperature)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generate(
    decoder: Transformer,
    params: Any,
    prompt: jax.Array,
    count: int,
    key: jax.Array | None,
    temperature: float,
) -> jax.Array:
    # Not from `init`, which would create new parameters, perhaps of another dtype.
    _, shapes = jax.eval_shape(lambda: decoder.apply({'params': params}, prompt, mutable=['cache']))
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes['cache'])

    def predict_next(cache: Any, tokens: jax.Array, key: jax.Array | None) -> tuple[Any, jax.Array]:
        variables = {'params': params, 'cache': cache}
        logits, state = decoder.apply(variables, tokens, mutable=['cache'])
        last = logits[:, -1].astype(jnp.float32)
        if key is None:
            return state['cache'], last.argmax(-1)
        return state['cache'], jax.random.categorical(key, last / temperature)

    def step(carry: tuple[Any, jax.Array], key: jax.Array | None) -> Any:
        # Returns the token of the previous step: the last one needs no further call of the model.
        cache, token = carry
        cache, next_token = predict_next(cache, token[:, None], key)
        return (cache, next_token), token

    keys = None if key is None else jax.random.split(key, count)
    first = predict_next(cache, prompt, None if keys is None else keys[0])
    rest = None if keys is None else keys[1:]
    (_, last), tokens = jax.lax.scan(step, first, rest, length=count - 1)
    return jnp.concatenate([tokens.T, last[:, None]], axis=1).astype(prompt.dtype)
