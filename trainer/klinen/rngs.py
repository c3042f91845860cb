# SPDX-License-Identifier: Apache-2.0
"""Random keys of a bound model, derived from the RNG stream's name and the module's path."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import errors

from trainer import compat
from trainer.modules import rng_streams

# One key for all streams, or a key for each stream by name.
Rng = jax.Array | dict[str, jax.Array]
Keys = Mapping[str, jax.Array]


def as_rng(value: Any) -> Rng:
    """Converts a key, a seed, or a dict of these by stream name, to keys.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, Mapping):
        return {name: _as_key(item) for name, item in value.items()}
    return _as_key(value)


def next_rng(rng: Rng) -> Rng:
    """Returns the next key, or the next keys of the streams."""
    if isinstance(rng, dict):
        return {name: jax.random.split(key)[0] for name, key in rng.items()}
    return jax.random.split(rng)[0]


def stream_keys(rng: Rng | None, streams: rng_streams.Streams) -> Keys:
    """Returns the keys of the streams that are known so far."""
    if isinstance(rng, dict):
        return rng
    if not isinstance(rng, (jax.Array, np.ndarray)):
        return {}  # None, or a placeholder of a tree function, such as a shape.
    return {name: _stream_key(rng, name) for name in sorted(streams.names)}


def fold_path(keys: Keys, path: tuple[str, ...]) -> dict[str, Any]:
    """Folds the keys with the path of a submodule.

    Called separately, it then draws the same random numbers as within the model.
    """
    return {name: compat.fold_in_path(key, path) for name, key in keys.items()}


def run(function: Callable[[Keys], Any], rng: Rng | None, streams: rng_streams.Streams) -> Any:
    """Returns `function(keys)`.

    Raises:
        flax.errors.InvalidRngError: if it draws from a stream that has no key.
    """
    try:
        # Given by stream, the keys are complete; one key serves every stream that is requested.
        if rng is None or isinstance(rng, dict):
            return function(rng or {})
        return streams.run(function, lambda name: _stream_key(rng, name))
    except errors.InvalidRngError as error:
        stream = compat.missing_stream(error)
        if stream is None:
            raise
        raise errors.InvalidRngError(
            f'the model draws from the RNG stream {stream!r} and has no key for it: first call '
            f'model = model.with_rng(rng) or model.with_rng({{{stream!r}: rng}}), or for '
            'evaluation model = model.eval()'
        ) from error


def _stream_key(key: jax.Array, name: str) -> jax.Array:
    # crc32 and not hash(), which Python salts differently in every process.
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _as_key(value: Any) -> jax.Array:
    key = value
    if not isinstance(key, (jax.Array, np.ndarray)):  # It may be an object that wraps a key.
        key = key.__jax_array__() if hasattr(key, '__jax_array__') else key
        key = getattr(key, 'rng', key)
    dtype, ndim = getattr(key, 'dtype', None), getattr(key, 'ndim', None)
    is_number = dtype is not None and jax.dtypes.issubdtype(dtype, np.integer)
    if isinstance(key, int) or (is_number and ndim == 0):
        return jax.random.key(key)
    # Of any shape: an array of keys is for a model under `jax.vmap`. uint32 is a raw key.
    is_key = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if is_key or (dtype == np.uint32 and ndim):
        return key
    got = type(value).__name__ if dtype is None else f'an array {dtype} {key.shape}'
    raise TypeError(
        'rng: expected a key such as jax.random.key(0), a seed, or a dict of these by stream '
        f'name, got {got}'
    )
