# SPDX-License-Identifier: Apache-2.0
"""Random keys of a bound model, derived from the name of the RNG stream and the path."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import errors

from trainer import compat
from trainer.modules import rng_streams

# One key for every stream, or the keys by the names of their streams.
Rng = jax.Array | dict[str, jax.Array]
Keys = Mapping[str, jax.Array]


def as_rng(given: Any) -> Rng:
    """Returns a key, a seed, or a dict of these by stream, as keys.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(given, Mapping):
        return {name: _key(value) for name, value in given.items()}
    return _key(given)


def next_rng(rng: Rng) -> Rng:
    """Returns the next key, or the next keys of the streams."""
    if isinstance(rng, dict):
        return {name: jax.random.split(key)[0] for name, key in rng.items()}
    return jax.random.split(rng)[0]


def known_keys(rng: Rng | None, asked: rng_streams.Streams) -> Keys:
    """Returns the keys of the streams that are known so far."""
    if isinstance(rng, dict):
        return rng
    if not isinstance(rng, (jax.Array, np.ndarray)):
        return {}  # None, or a shape or whatever else a tree function has put in the key's place.
    return {name: _stream_key(rng, name) for name in sorted(asked.names)}


def fold_path(keys: Keys, path: tuple[str, ...]) -> dict[str, Any]:
    """Returns the keys as they arrive at `path` of a model, so that a part draws the same alone."""
    return {name: compat.fold_in_path(key, path) for name, key in keys.items()}


def run(function: Callable[[Keys], Any], rng: Rng | None, asked: rng_streams.Streams) -> Any:
    """Returns `function(keys)`.

    Raises:
        flax.errors.InvalidRngError: if it draws from a stream that has no key.
    """
    try:
        if rng is None or isinstance(rng, dict):
            return function(rng or {})
        return asked.run(function, lambda name: _stream_key(rng, name))
    except errors.InvalidRngError as error:
        stream = compat.missing_stream(error)
        if stream is None:
            raise
        raise errors.InvalidRngError(
            f'the model draws from the random stream {stream!r} and has no key for it: first call '
            f'model = model.with_rng(rng), or with_rng({{{stream!r}: rng}}); in evaluation '
            'model = model.eval()'
        ) from error


def _stream_key(key: jax.Array, name: str) -> jax.Array:
    # crc32 and not hash(): Python salts hash() anew in every process.
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _key(given: Any) -> jax.Array:
    wrapped = given
    if not isinstance(given, (jax.Array, np.ndarray)):  # Perhaps an object around a key.
        given = given.__jax_array__() if hasattr(given, '__jax_array__') else given
        given = getattr(given, 'rng', given)
    kind, ndim = getattr(given, 'dtype', None), getattr(given, 'ndim', None)
    is_number = kind is not None and jax.dtypes.issubdtype(kind, np.integer)
    if isinstance(given, int) or (is_number and ndim == 0):
        return jax.random.key(given)
    # Several keys are for several models, as `jax.vmap` makes them.
    is_key = kind is not None and jax.dtypes.issubdtype(kind, jax.dtypes.prng_key)
    if is_key or (kind == np.uint32 and ndim):
        return given
    got = type(wrapped).__name__ if kind is None else f'an array {kind} {given.shape}'
    raise TypeError(
        f'rng: expected a key such as jax.random.key(0), a seed, or a dict of these by stream, got '
        f'{got}'
    )
