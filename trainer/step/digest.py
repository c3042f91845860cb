# SPDX-License-Identifier: Apache-2.0
"""A number over a whole state that is equal for equal states on any mesh."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.modules.linen import param_path


def leaf_sums(state: Any) -> jax.Array:
    """Returns one uint32 for each leaf, (leaves,), computed where the leaf lives.

    The sum wraps around, so it is the same in any order of addition: on one device or on many.
    """
    return jnp.stack([_leaf_sum(leaf) for leaf in jax.tree.leaves(state)])


def combine(state: Any, sums: np.ndarray) -> str:
    """Returns 16 hexadecimal digits over the sums, paths, dtypes and shapes of all leaves.

    Args:
        state: the state, or its abstract shapes.
        sums: what `leaf_sums` returned.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    lines = sorted(
        f'{param_path(path)} {leaf.dtype} {leaf.shape} {int(value):08x}'
        for (path, leaf), value in zip(leaves, sums, strict=True)
    )
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


def _leaf_sum(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    index = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
    mixed = (words ^ (index * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """Returns the leaf's bits as uint32; 64-bit values become two words each."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
