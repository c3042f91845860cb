# SPDX-License-Identifier: Apache-2.0
"""Text from a trained language model, token by token."""

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
    """Returns tokens that follow a prompt, int (batch, count); each costs one token's computation.

    Compiled once for each model, number of tokens and shape of the prompt.

    Args:
        model: as it was trained.
        params: its parameters.
        prompt: int (batch, length), at least one token each.
        count: tokens to add.
        key: draws them by their probabilities; without it, each is the most probable one.
        temperature: divides the logits before one is drawn; more than 0.

    Raises:
        ValueError: if they are more than the model has positions for, or none; if the prompt is not
            of two dimensions, or the temperature not positive.
    """
    if prompt.ndim != 2:
        raise ValueError(f'a prompt of shape {prompt.shape}: expected (batch, length)')
    if not (prompt.shape[1] and count > 0):
        raise ValueError(f'a prompt of {prompt.shape[1]} tokens, {count} to add: neither may be 0')
    total = prompt.shape[1] + count
    if total > model.max_length:
        raise ValueError(f'{total} tokens with the prompt, but max_length is {model.max_length}')
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(
            f'temperature {temperature}: expected more than 0; leave out key for the most probable '
            'tokens'
        )
    # A module is hashable as long as its fields are: one compilation for equal models and shapes.
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
    # By a call and not by `init`, which creates new parameters, perhaps of another dtype.
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
        cache, token = carry
        cache, next_token = predict_next(cache, token[:, None], key)
        return (cache, next_token), token

    keys = None if key is None else jax.random.split(key, count)
    first = predict_next(cache, prompt, None if keys is None else keys[0])
    rest = None if keys is None else keys[1:]
    (_, last), tokens = jax.lax.scan(step, first, rest, length=count - 1)
    return jnp.concatenate([tokens.T, last[:, None]], axis=1).astype(prompt.dtype)
