# SPDX-License-Identifier: Apache-2.0
"""The allowed range of values of a batch, such as labels: part of a task's output."""

from __future__ import annotations

import flax.struct
import jax


@flax.struct.dataclass
class Check:
    """The allowed range of a field of the batch.

    Attributes:
        values: (batch, ...), integers or floats.
        low: the smallest that may be there.
        high: the largest.
        ignored: a value that may be there, too, or None.
        why: where the range comes from, and what to do: the end of the message.
    """

    values: jax.Array
    low: int = flax.struct.field(pytree_node=False)
    high: int = flax.struct.field(pytree_node=False)
    ignored: int | None = flax.struct.field(pytree_node=False, default=None)
    why: str = flax.struct.field(pytree_node=False, default='Fix the data')
