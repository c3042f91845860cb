# SPDX-License-Identifier: Apache-2.0
"""Batch normalization over groups of examples."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_GROUPS = 'groups'

# Without Flax's wrapper around methods, because it runs within another call of the same module.
_call: Any = inspect.unwrap(nn.BatchNorm.__call__)


class GroupedBatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` that normalizes groups of examples with separate statistics in training.

    A batch is split into groups of consecutive examples, regardless of their devices. With as many
    groups as devices, each device has its own statistics and none are exchanged, as under `pmap`
    without an axis name. The noise of small groups regularizes large batches.

    The running statistics follow the means and variances of the groups, averaged over the groups,
    like those of replicas that are averaged before an evaluation. So the variance is that within a
    group, by which training divides. Evaluation uses them for all examples. Names and shapes of the
    variables are those of `nn.BatchNorm`.

    Attributes:
        groups: number of groups; must divide the batch size, or with `accumulate` the size of a
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
        """Returns the normalized inputs, of the same shape.

        Args:
            x: inputs (batch, ...).
            use_running_average: see `nn.BatchNorm`.
            mask: see `nn.BatchNorm`; the elements to include in statistics.

        Raises:
            ValueError: if the batch size is not divisible by the number of groups.
        """
        running = nn.merge_param(
            'use_running_average', self.use_running_average, use_running_average
        )
        # Initialization only creates the variables, with a batch of any size.
        if running or self.groups == 1 or self.is_initializing():
            return _call(self, x, use_running_average, mask=mask)
        if self.groups < 1 or x.shape[0] % self.groups:
            raise ValueError(f'{x.shape[0]} examples are not divisible into groups={self.groups}')
        # Parameters and running statistics are shared by the groups: axis None.
        normalize_groups = nn.vmap(
            functools.partial(_normalize_group, use_running_average=use_running_average),
            variable_axes={'params': None, 'batch_stats': None},
            split_rngs={'params': False},
            axis_name=_GROUPS,
        )
        grouped = (self.groups, x.shape[0] // self.groups, *x.shape[1:])
        masks = None if mask is None else jnp.broadcast_to(mask, x.shape).reshape(grouped)
        return normalize_groups(self, x.reshape(grouped), masks).reshape(x.shape)


def _normalize_group(
    norm: nn.BatchNorm, x: jax.Array, mask: jax.Array | None, *, use_running_average: bool | None
) -> jax.Array:
    """Normalizes a group within `vmap`, and averages the running statistics over all groups."""
    output = _call(norm, x, use_running_average, mask=mask)
    # The update is linear, so the average of the updated statistics is the update by the average.
    for name in ('mean', 'var'):
        updated: Any = norm.get_variable('batch_stats', name)
        norm.put_variable('batch_stats', name, jax.lax.pmean(updated, _GROUPS))
    return output
