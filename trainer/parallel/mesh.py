# SPDX-License-Identifier: Apache-2.0
"""The device mesh and where each array of the run lives on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainer.config.errors import UserError

# The mesh axes that the rows of a batch are spread over, those of them that a mesh has.
BATCH_AXES = ('data', 'fsdp')


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """Returns a mesh over all devices, the axes in the order given; one size may be -1 (the rest).

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
            # The default has an axis that the user may never have heard of.
            advice = (
                f'one of them may be -1 for the rest: give {" or ".join(free)} a size, such as '
            )
            advice += (
                f'--config.mesh.{free[0]}=1 (an axis that is not given is that of the default)'
            )
        raise UserError(
            f'config.mesh: {dict(axes)} does not fit {devices} devices. The sizes must multiply to '
            f'{devices}; {advice}.'
        )
    # Auto axes: Linen's partitioned initialisation fails under the default, Explicit ones.
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that the rows of a batch are cut into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES if name in mesh.shape)


def batch_sharding(mesh: Mesh, *, leading_dims: int = 0) -> NamedSharding:
    """Returns the sharding of a batch: rows over the data axes, after `leading_dims` whole ones."""
    axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading_dims, axes or None))


@dataclasses.dataclass(frozen=True)
class ProcessRows:
    """Which rows of a global batch one process has to do with.

    Attributes:
        held: int64, the rows that its devices hold, ascending.
        owned: bool, which of these it answers for: where two processes hold a row, one of them.
        total: rows of the global batch.
    """

    held: np.ndarray
    owned: np.ndarray
    total: int

    @classmethod
    def from_mesh(cls, mesh: Mesh, rows: int) -> ProcessRows:
        """Returns those of this process, of batches of so many rows."""
        slices: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((rows,))
        owner = np.full(rows, jax.process_count())
        held = np.zeros(rows, bool)
        for device, (part,) in slices.items():
            owner[part] = np.minimum(owner[part], device.process_index)
            held[part] |= device.process_index == jax.process_index()
        return cls(np.flatnonzero(held), (owner == jax.process_index())[held], rows)

    def assemble(self, x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        """Returns the global array whose held rows are those of `x`.

        Args:
            x: (held, ...), or (steps, held, ...) for a sharding with a dimension before the rows.
            sharding: of the global array.
        """
        before = len(sharding.spec) - 1
        shape = (*x.shape[:before], self.total, *x.shape[before + 1 :])
        return jax.make_array_from_process_local_data(sharding, x, shape)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
