# SPDX-License-Identifier: Apache-2.0
"""A digest of a whole state, the same for equal states on any mesh.

It is a sum over hashed words rather than a cryptographic hash, because a sum can be computed on the
devices, shard by shard, without gathering the state.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.modules.model_view import param_path

# Number of words that numpy hashes at a time: small enough for the CPU cache.
_CHUNK_WORDS = 2**16


def leaf_sums(state: Any) -> jax.Array:
    """Returns one uint32 per leaf, (leaves,), computed on the devices of the leaf.

    Sums wrap around, so the order of addition does not matter: one device and many agree.
    """
    return jnp.stack([_leaf_sum(leaf) for leaf in jax.tree.leaves(state)])


def host_sums(state: Any) -> np.ndarray:
    """Returns the same as `leaf_sums`, computed by numpy in chunks.

    For states in host memory, where a program over the whole state would block the training step.
    """
    return np.array([_host_sum(leaf) for leaf in jax.tree.leaves(state)], np.uint32)


def combine(state: Any, sums: np.ndarray) -> str:
    """Returns 16 hexadecimal digits over the sums, paths, dtypes and shapes of all leaves.

    Args:
        state: the state, or its abstract shapes.
        sums: what `leaf_sums` returned.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    # Sorted: containers of other types have their leaves in another order, and the same paths.
    lines = sorted(
        f'{param_path(path)} {leaf.dtype} {leaf.shape} {int(value):08x}'
        for (path, leaf), value in zip(leaves, sums, strict=True)
    )
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


def _leaf_sum(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    # The index of each word in the global array, so that swapped values change the sum. It is built
    # from iotas, because flattening a sharded array may gather it.
    index = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
    # Mixed like at the end of MurmurHash3, so that differences of several words do not cancel out.
    mixed = (words ^ (index * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


def _host_sum(leaf: Any) -> int:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
        return _sum_of_words(np.asarray(leaf))
    # Shard by shard: converting the whole array would assemble it, and JAX would cache the copy.
    parts = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    sums = (_sum_of_words(np.asarray(p.data), _global_indices(p.index, leaf.shape)) for p in parts)
    return sum(sums) % 2**32


def _global_indices(shard: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Returns the index in the global array of each element of a shard, uint32 (elements,)."""
    index = np.zeros((), np.uint32)
    for part, size in zip(shard, shape, strict=True):
        along = np.arange(size, dtype=np.uint32)[part]
        index = index[..., None] * np.uint32(size) + along
    return index.ravel()


def _sum_of_words(array: np.ndarray, indices: np.ndarray | None = None) -> int:
    flat = np.ascontiguousarray(array).reshape(-1)
    words = flat.view({1: np.uint8, 2: np.uint16}.get(flat.dtype.itemsize, np.uint32))
    each = max(1, flat.dtype.itemsize // 4)  # Words of an element.
    total = 0
    for start in range(0, len(words), _CHUNK_WORDS):
        mixed = words[start : start + _CHUNK_WORDS].astype(np.uint32)
        order = np.arange(start, start + len(mixed), dtype=np.uint64)
        index = order.astype(np.uint32)
        if indices is not None:
            index = indices[order // each] * np.uint32(each) + index % np.uint32(each)
        mixed ^= index * np.uint32(0x9E3779B1)
        mixed *= np.uint32(0x85EBCA6B)
        mixed ^= mixed >> np.uint32(15)
        mixed *= np.uint32(0xC2B2AE35)
        mixed ^= mixed >> np.uint32(13)
        total += int(mixed.sum(dtype=np.uint64))
    return total % 2**32


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
