# SPDX-License-Identifier: Apache-2.0
"""Range checks of batch values, such as labels; a task returns them with its losses."""

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
        why: the end of the error message: the reason for the range, and how to fix the data.
    """

    # The only array. The other fields are static, because error messages need them when only the
    # shapes of an output are known.
    values: jax.Array
    low: int = flax.struct.field(pytree_node=False)
    high: int = flax.struct.field(pytree_node=False)
    ignored: int | None = flax.struct.field(pytree_node=False, default=None)
    why: str = flax.struct.field(pytree_node=False, default='Fix the data')
