# SPDX-License-Identifier: Apache-2.0
"""The sharding of each array of the state."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainer.parallel.mesh import batch_sharding, batch_shards, replicated_sharding
from trainer.step.state import TrainState


def state_shardings(abstract: TrainState, param_specs: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every leaf; slots and average are sharded like their parameter.

    Args:
        abstract: the state's shapes, from `jax.eval_shape`.
        param_specs: the partition spec of each parameter.
        mesh: the device mesh.
    """
    replicated = replicated_sharding(mesh)

    def replicate(tree: Any) -> Any:
        return jax.tree.map(lambda _: replicated, tree)

    params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs)
    # A `TrainState` of shardings instead of arrays.
    shardings: dict[str, Any] = dict(
        step=replicated,
        params=params,
        opt_state=_match_params(abstract.opt_state, abstract.params, params, replicated),
        # Statistics are small, and each device needs all of them in every step.
        collections=replicate(abstract.collections),
        metrics=replicate(abstract.metrics),
        ema=None if abstract.ema is None else params,
        loss_scale=replicate(abstract.loss_scale),
        health=replicate(abstract.health),
        carry=_shard_carry(abstract.carry, mesh),
    )
    return TrainState(**shardings)


def _shard_carry(carry: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a collected carry: rows of batches, and whatever divides evenly."""
    if carry is None:
        return None
    shards, replicated = batch_shards(mesh), replicated_sharding(mesh)

    def shard_first(x: Any) -> NamedSharding:
        # Such as the states of several environments.
        divides = bool(x.shape) and x.shape[0] % shards == 0
        return batch_sharding(mesh) if divides else replicated

    return type(carry)(
        source=jax.tree.map(shard_first, carry.source),
        batches=jax.tree.map(lambda _: batch_sharding(mesh, leading_dims=1), carry.batches),
    )


def _match_params(tree: Any, params: Any, shardings: Any, default: NamedSharding) -> Any:
    """Returns for each leaf of `tree` the sharding of the parameter that its path ends with.

    The slot of parameter a/b is at .../mu/a/b in an optimizer state. `optax.tree_map_params` cannot
    be used, because it fails if some parameters are masked out.
    """
    known = {
        _keys(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def find(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = _keys(path)
        # The longest suffix first: 'a/b' and 'b' can both be parameters.
        for start in range(len(keys)):
            shape, sharding = known.get(keys[start:], (None, default))
            # A leaf of another shape, such as Adafactor's means over rows, is not a slot. Several
            # slots may be stacked along new leading dimensions, as in the memory of L-BFGS.
            if shape and leaf.shape[-len(shape) :] == shape:
                return _add_dimensions(sharding, len(leaf.shape) - len(shape))
        return default

    return jax.tree_util.tree_map_with_path(find, tree)


def _add_dimensions(sharding: NamedSharding, count: int) -> NamedSharding:
    """Returns the sharding of arrays with `count` more dimensions in front, which stay whole."""
    if count == 0:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*[None] * count, *sharding.spec))


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
