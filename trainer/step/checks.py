# SPDX-License-Identifier: Apache-2.0
"""Range checks of integers in a batch, such as labels, inside the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Check:
    """The allowed range of a field of the batch.

    Attributes:
        values: int (batch, ...).
        low: the smallest allowed value.
        high: the largest.
        ignored: one more allowed value, or None.
    """

    values: jax.Array
    low: int = flax.struct.field(pytree_node=False)
    high: int = flax.struct.field(pytree_node=False)
    ignored: int | None = flax.struct.field(pytree_node=False, default=None)

    def fails(self, values: Any) -> Any:
        """Returns for each value whether it is out of the range."""
        values = values.astype(np.int64 if isinstance(values, np.ndarray) else jnp.int32)
        bad = (values < self.low) | (values > self.high)
        return bad if self.ignored is None else bad & (values != self.ignored)


def run_checks(checks: Mapping[str, Check], weights: Any) -> tuple[jax.Array, jax.Array]:
    """Runs the checks on all rows with a nonzero weight.

    Args:
        checks: by batch key.
        weights: of the task's output, (batch, ...) or several such: a row is checked if any of
            its weights is not 0.

    Returns:
        1 + the index of the first check that fails, in order of the names, 0 for none; and a value
        out of its range: int32 scalars.
    """
    number = value = jnp.zeros((), jnp.int32)
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
    """Returns the smallest of the selected values, int32."""
    largest = jnp.iinfo(jnp.int32).max
    return jnp.min(jnp.where(wanted, values.astype(jnp.int32), largest), initial=largest)


def complain(
    where: str,
    when: str,
    checks: Mapping[str, Check],
    number: int,
    value: int,
    blocks: Iterable[Any],
) -> str:
    """Returns the message for a value out of its range.

    Args:
        where: config path of the task.
        when: such as 'in step 12'.
        checks: by batch key; their `values` are not used.
        number: index of the failed check, in order of the names.
        value: the one found.
        blocks: of the loader, with the rows to search; a transform may have changed the value.
    """
    name, check = sorted(checks.items())[number]
    example = _find_example(name, check, value, blocks)
    at = when if example is None else f'example {example} {when}'
    return (
        f'{where}: batch[{name!r}] holds {value} ({at}); expected {check.low} to {check.high}, '
        f'because the model returns {check.high - check.low + 1} logits. Fix the data or the '
        "number of outputs; if the value marks unlabeled examples, set the task's ignore_label"
    )


def _find_example(name: str, check: Check, value: int, blocks: Iterable[Any]) -> int | None:
    """Returns the id of the first example that holds the value."""
    for block in blocks:
        if name not in block.arrays:
            return None
        values = np.asarray(block.arrays[name])
        bad = (values == value) & check.fails(values)
        rows = bad.reshape(*block.ids.shape, -1).any(-1) & (block.ids >= 0)
        if rows.any():
            return int(block.ids[rows][0])
    return None
