# SPDX-License-Identifier: Apache-2.0
"""Arrays without elements, which Orbax does not store: the checkpoint metadata describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.modules.model_view import path_names

Names = tuple[str, ...]
_KEY = 'empty'


def is_empty(leaf: Any) -> bool:
    """Whether an array, or its abstract shape, has no elements."""
    return math.prod(leaf.shape) == 0


def remove(tree: Any) -> Any:
    """Returns a tree without its empty arrays."""
    return jax.tree.map(lambda leaf: None if is_empty(leaf) else leaf, tree)


def to_metadata(tree: Any) -> dict[str, Any]:
    """Returns the metadata entry that describes the empty arrays of a tree, or {}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    empties = [(path_names(path), _stored_form(leaf)) for path, leaf in leaves if is_empty(leaf)]
    entries = [[names, str(leaf.dtype), list(leaf.shape)] for names, leaf in empties]
    return {_KEY: entries} if entries else {}


def from_metadata(meta: Mapping[str, Any]) -> dict[Names, jax.ShapeDtypeStruct]:
    """Returns the empty arrays that metadata describes, by the names along their key paths."""
    return {
        tuple(names): jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        for names, dtype, shape in meta.get(_KEY, ())
    }


def make(leaf: Any) -> jax.Array:
    """Returns an empty array with the shape, dtype and sharding of a leaf."""
    sharding = getattr(leaf, 'sharding', None)
    if is_key(leaf):
        # The implementation of the key: `key_impl` accepts tracers, but not abstract shapes.
        kinds: list[Any] = []
        jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), leaf)
        data = jnp.zeros(_stored_form(leaf).shape, jnp.uint32)
        return jax.device_put(jax.random.wrap_key_data(data, impl=kinds[0]), sharding)
    value = np.zeros(leaf.shape, leaf.dtype)
    if sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: value[index])


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed RNG keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored_form(leaf: Any) -> Any:
    """Returns the shape and dtype that are stored: for a typed key, those of its data."""
    return jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
