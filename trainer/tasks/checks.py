# SPDX-License-Identifier: Apache-2.0
"""Values of a batch that must be in a range, such as labels: checked inside the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# Probabilities may be off by rounding.
_ROUNDING = 1e-3


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

    def fails(self, values: Any) -> Any:
        """Returns for each value whether it is out of the range; NaN is."""
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            # A range of bytes cannot be compared with a number that no byte holds.
            values = values.astype(np.int64 if isinstance(values, np.ndarray) else jnp.int32)
        slack = 0 if not jnp.issubdtype(values.dtype, jnp.inexact) else _ROUNDING
        bad = ~((values >= self.low - slack) & (values <= self.high + slack))
        return bad if self.ignored is None else bad & (values != self.ignored)


def run_checks(checks: Mapping[str, Check], weights: Any) -> tuple[jax.Array, jax.Array]:
    """Runs the checks on all rows with a nonzero weight.

    Args:
        checks: by batch key.
        weights: of the task's output, (batch, ...) or several such: a row is checked if any of
            its weights is not 0.

    Returns:
        1 + the number of the first check that fails, in the order of the names, 0 for none: int32
        scalar; and a value that is out of its range: float32 scalar.
    """
    number, value = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    for index, (_, check) in enumerate(sorted(checks.items()), start=1):
        values = check.values
        counts = jnp.zeros(values.shape[:1], bool)
        for each in jax.tree.leaves(weights):
            counts |= (each != 0).reshape(len(each), -1).any(-1)
        bad = (check.fails(values) & counts.reshape(-1, *[1] * (values.ndim - 1))).ravel()
        first = bad.any() & (number == 0)
        number = jnp.where(first, index, number)
        # With a sum and not by index: the batch may be sharded.
        value = jnp.where(first, _pick(values.ravel(), bad), value)
    return number, value


def _pick(values: jax.Array, wanted: jax.Array) -> jax.Array:
    """Returns the smallest of the wanted values, float32."""
    # NaN, if that is what is wrong, comes through.
    return jnp.min(jnp.where(wanted, values.astype(jnp.float32), jnp.inf), initial=jnp.inf)


def complain(
    where: str,
    when: str,
    checks: Mapping[str, Check],
    number: int,
    value: float,
    blocks: Iterable[Any],
    *,
    numbered: bool = True,
) -> str:
    """Returns the message for a value out of its range.

    Args:
        where: config path of the task.
        when: such as 'in step 12'.
        checks: by batch key; their `values` are not used.
        number: index of the failed check, in order of the names.
        value: the one found.
        blocks: of the loader, with the rows to search; a transform may have changed the value.
        numbered: whether examples have numbers; those of a stream have none.
    """
    name, check = sorted(checks.items())[number]
    place = _find_example(name, check, value, blocks, numbered=numbered)
    at = f'{place} {when}' if place else when
    shown = f'{value:.0f}' if value.is_integer() else f'{value:.9g}'
    return (
        f'{where}: batch[{name!r}] holds {shown} ({at}); expected {check.low} to {check.high}. '
        f'{check.why}'
    )


def _find_example(
    name: str, check: Check, value: float, blocks: Iterable[Any], *, numbered: bool
) -> str:
    """Returns 'example 37' or 'row 5 of batch 2' for the first one with the value, or ''."""
    batches = 0
    for block in blocks:
        if name not in block.arrays:
            return ''
        values = np.asarray(block.arrays[name])
        # As the devices have seen it: rounded.
        same = np.isclose(values.astype(np.float32), value, rtol=1e-6, atol=0, equal_nan=True)
        bad = same & check.fails(values)
        rows = bad.reshape(*block.ids.shape, -1).any(-1) & (block.ids >= 0)
        if rows.any():
            batch, row = np.argwhere(rows)[0]
            if numbered:
                return f'example {block.ids[batch, row]}'
            return f'row {row} of batch {batches + batch}'
        batches += len(rows)
    return ''
