# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and the sharding of batches over it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainer.config.errors import UserError

# The mesh axes over which batches are sharded, if the mesh has them.
BATCH_AXES = ('data', 'fsdp')


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """Returns a mesh over all devices, axes in the given order; one size may be -1 (the rest).

    Raises:
        UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = dict(axes)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and fixed > 0 and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    positive = bool(sizes) and min(sizes.values()) > 0
    if not positive or math.prod(sizes.values()) != devices:
        advice = 'one of them may be -1 for the rest'
        if len(free) > 1:
            # One may come from the default config, so name the axes and the override.
            advice = (
                f'one of them may be -1 for the rest: give {" or ".join(free)} a size, such as '
            )
            advice += (
                f'--config.mesh.{free[0]}=1 (axes that are not set come from the default config)'
            )
        raise UserError(
            f'config.mesh: {dict(axes)} does not fit {devices} device'
            f'{"s" if devices != 1 else ""}. The sizes must multiply to {devices}; {advice}.'
        )
    # Auto axes: Linen's partitioned initialization fails with explicit ones, JAX's default.
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES if name in mesh.shape)


def batch_sharding(mesh: Mesh, *, leading_dims: int = 0) -> NamedSharding:
    """Returns the sharding of a batch: examples over `BATCH_AXES`.

    Args:
        mesh: the device mesh.
        leading_dims: number of dimensions before that of the examples, which are not sharded.
    """
    axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading_dims, axes or None))


def whole_batch_sharding(
    mesh: Mesh, shape: Sequence[int], *, leading_dims: int = 0
) -> NamedSharding:
    """Returns the sharding of an array of a batch that need not have one entry per example.

    Over `BATCH_AXES` if its first dimension divides evenly, otherwise the array is replicated.

    Args:
        mesh: the device mesh.
        shape: shape of the array.
        leading_dims: number of dimensions before the first one of the batch.
    """
    if len(shape) > leading_dims and shape[leading_dims] % batch_shards(mesh) == 0:
        return batch_sharding(mesh, leading_dims=leading_dims)
    return replicated_sharding(mesh)


@dataclasses.dataclass(frozen=True)
class LocalExamples:
    """The examples of a global batch that are on the devices of one process.

    Attributes:
        indices: int64 (local examples,), in the global batch, ascending.
        is_owned: bool (local examples,), whether this process is the owner: an example that is
            replicated over several processes has one owner, which alone counts or writes it.
        total: number of examples of the global batch.
    """

    indices: np.ndarray
    is_owned: np.ndarray
    total: int

    @classmethod
    def from_mesh(cls, mesh: Mesh, batch_size: int) -> LocalExamples:
        """Returns the examples of this process: all, if they do not divide over the devices.

        Args:
            mesh: the device mesh.
            batch_size: number of examples of the global batch.
        """
        sharding = whole_batch_sharding(mesh, (batch_size,))
        slices: Mapping[Any, Any] = sharding.devices_indices_map((batch_size,))
        # The owner is the process with the lowest index. Each process computes the same owners from
        # the mesh, without communication.
        owner = np.full(batch_size, jax.process_count())
        is_local = np.zeros(batch_size, bool)
        for device, (part,) in slices.items():
            owner[part] = np.minimum(owner[part], device.process_index)
            is_local[part] |= device.process_index == jax.process_index()
        is_owned = (owner == jax.process_index())[is_local]
        return cls(np.flatnonzero(is_local), is_owned, batch_size)

    def assemble(self, x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        """Returns the global array, given the examples of this process.

        Args:
            x: (local examples, ...), or (steps, local examples, ...) for a sharding with leading
                dimensions.
            sharding: sharding of the global array.
        """
        before = len(sharding.spec) - 1
        shape = (*x.shape[:before], self.total, *x.shape[before + 1 :])
        return jax.make_array_from_process_local_data(sharding, x, shape)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a replicated array."""
    return NamedSharding(mesh, PartitionSpec())
