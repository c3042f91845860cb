# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation of groups of rows."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_GROUPS = 'groups'

# Without what Flax does around a call: here it is a part of another one.
_call: Any = inspect.unwrap(nn.BatchNorm.__call__)


class GroupedBatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` that normalises groups of rows by statistics of their own in training.

    The rows of a batch are cut into groups of consecutive ones, wherever they are; with as many
    groups as devices each device has its own statistics, and none are exchanged, as under `pmap`
    without an axis name. Noise of small groups regularises large batches.

    The running statistics follow the averages over the groups of their means and variances, as
    those of replicas do that are averaged before an evaluation; the variance is thus that within a
    group, which is what training divides by. Evaluation uses them for all rows. Names and shapes of
    the variables are those of `nn.BatchNorm`.

    Attributes:
        groups: their number, which divides the rows. With `accumulate`, it is that of each
            micro-batch.
    """

    groups: int = 1

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the normalised inputs, of the same shape.

        Args:
            x: (rows, ...).
            use_running_average: as of `nn.BatchNorm`.
            mask: as of `nn.BatchNorm`; which elements statistics are of.

        Raises:
            ValueError: if the rows do not divide into the groups.
        """
        running = nn.merge_param(
            'use_running_average', self.use_running_average, use_running_average
        )
        if running or self.groups == 1 or self.is_initializing():
            return _call(self, x, use_running_average, mask=mask)
        if self.groups < 1 or x.shape[0] % self.groups:
            raise ValueError(f'{x.shape[0]} rows do not divide into groups={self.groups}')
        every = nn.vmap(
            functools.partial(_normalize_group, use_running_average=use_running_average),
            variable_axes={'params': None, 'batch_stats': None},
            split_rngs={'params': False},
            axis_name=_GROUPS,
        )
        cut = (self.groups, x.shape[0] // self.groups, *x.shape[1:])
        masks = None if mask is None else jnp.broadcast_to(mask, x.shape).reshape(cut)
        return every(self, x.reshape(cut), masks).reshape(x.shape)


def _normalize_group(
    norm: nn.BatchNorm, x: jax.Array, mask: jax.Array | None, *, use_running_average: bool | None
) -> jax.Array:
    """Normalises a group within `vmap`; the running statistics are of the mean over all groups."""
    output = _call(norm, x, use_running_average, mask=mask)
    for name in ('mean', 'var'):
        moved: Any = norm.get_variable('batch_stats', name)
        norm.put_variable('batch_stats', name, jax.lax.pmean(moved, _GROUPS))
    return output
