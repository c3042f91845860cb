# SPDX-License-Identifier: Apache-2.0
"""Finds the example with a value out of range, after a step has reported one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from trainer.tasks.checks import Check
from trainer.tasks.runner import is_out_of_range


def describe_bad_value(
    where: str,
    when: str,
    checks: Mapping[str, Check],
    number: int,
    value: float,
    blocks: Iterable[Any],
    *,
    numbered: bool = True,
) -> str:
    """Returns the error message for a value out of range.

    Args:
        where: key path of the task in the config.
        when: such as 'in step 12'.
        checks: the checks by batch key; their `values` are not used.
        number: index of the failed check, in order of the names.
        value: the value that failed.
        blocks: blocks of the loader to search. A transform may have changed the value, so it may
            not be found.
        numbered: whether examples have numbers; those of a stream have none.
    """
    # `run_checks` numbers the checks in the order of their names, too.
    name, check = sorted(checks.items())[number]
    example = _find_example(name, check, value, blocks, numbered=numbered)
    location = f'{example} {when}' if example else when
    text = f'{value:.0f}' if value.is_integer() else f'{value:.9g}'
    return (
        f'{where}: batch[{name!r}] contains {text} ({location}); expected {check.low} to '
        f'{check.high}. {check.why}'
    )


def _find_example(
    name: str, check: Check, value: float, blocks: Iterable[Any], *, numbered: bool
) -> str:
    """Returns 'example 37' or 'example 5 of batch 2' for the first match, '' if there is none."""
    batches = 0
    for block in blocks:
        if name not in block.arrays:
            return ''
        values = np.asarray(block.arrays[name])
        if values.shape[:2] != block.ids.shape:
            return ''  # Its entries are those of something else than examples.
        # Compare in float32, because the devices have rounded the value to it.
        same = np.isclose(values.astype(np.float32), value, rtol=1e-6, atol=0, equal_nan=True)
        bad = same & is_out_of_range(check, values)
        # Ids of padding are negative: it repeats an example that is reported itself.
        is_bad = bad.reshape(*block.ids.shape, -1).any(-1) & (block.ids >= 0)
        if is_bad.any():
            batch, index = np.argwhere(is_bad)[0]
            if numbered:
                return f'example {block.ids[batch, index]}'
            return f'example {index} of batch {batches + batch}'
        batches += len(is_bad)
    return ''
