# SPDX-License-Identifier: Apache-2.0
"""The summaries that a task returns: images, histograms and arrays with an entry per example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.modules.shapes import describe
from trainer.observe.summaries import Images, Summary, Traced
from trainer.observe.summary_files import check_name

_EXPECTED = (
    'Images, Histogram or Arrays of `trainer.summaries`, of arrays with an entry per example'
)


def check_summaries(summaries: Mapping[str, Any], size: int) -> None:
    """Checks the summaries of a task, from shapes.

    Args:
        summaries: what the task returned as summaries, by name.
        size: number of examples of the batch.

    Raises:
        UserError: if one of them cannot be written. The message continues a sentence that begins
            with the name of the task.
    """
    for name, summary in summaries.items():
        try:
            check_name(name)
        except UserError as error:
            raise UserError(f'returned summaries: {error}') from error
        what = f'returned the summary {name!r}'
        if not isinstance(summary, Traced):
            kind = describe(summary) if hasattr(summary, 'shape') else type(summary).__name__
            raise UserError(f'{what}, {kind}; expected {_EXPECTED}, computed from the batch')
        for x in jax.tree.leaves(summary.arrays):
            least = 3 if summary.kind is Images else 1
            if np.ndim(x) < least or not 0 < np.shape(x)[0] <= size:
                raise UserError(
                    f'{what} of {describe(x)}; expected one entry for each of the {size} examples '
                    f'of the batch, or for the first of them, in at least {least} dimensions'
                )
        try:
            summary.create(lambda x: np.zeros(x.shape, x.dtype))
        except UserError as error:
            raise UserError(f'{what}: {error}') from error


def create_summaries(summaries: Mapping[str, Any], mask: np.ndarray) -> dict[str, Summary]:
    """Returns the summaries of a task without the entries of padding.

    Args:
        summaries: summaries by name, with numpy arrays.
        mask: bool (batch,), False for padding.
    """
    created: dict[str, Summary] = {}
    for name, summary in summaries.items():
        # If all entries are padding, there is nothing to show.
        if all(mask[: len(x)].any() for x in jax.tree.leaves(summary.arrays)):
            created[name] = summary.create(lambda x: x[mask[: len(x)]])
    return created
