# SPDX-License-Identifier: Apache-2.0
"""Range checks of a batch's values, such as labels; they are part of a task's output."""

from __future__ import annotations

import flax.struct
import jax


@flax.struct.dataclass
class Check:
    """The allowed range of a field of the batch.

    Attributes:
        values: (batch, ...), integers or floats.
        low: the smallest allowed value.
        high: the largest allowed value.
        ignored: another allowed value, or None.
        why: the end of the message: the reason for the range, and how to fix the data.
    """

    values: jax.Array
    low: int = flax.struct.field(pytree_node=False)
    high: int = flax.struct.field(pytree_node=False)
    ignored: int | None = flax.struct.field(pytree_node=False, default=None)
    why: str = flax.struct.field(pytree_node=False, default='Fix the data')
