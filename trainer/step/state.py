# SPDX-License-Identifier: Apache-2.0
"""The train state: everything that changes from step to step, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
import optax

from trainer.step.health import Health
from trainer.step.loss_scale import LossScale, choose


@flax.struct.dataclass
class TrainState:
    """A pytree that is donated to every step and saved in every checkpoint.

    Attributes:
        step: int32 scalar, number of batches so far, including those of skipped updates.
        params: nested dict of parameters, without axis metadata.
        opt_state: the optimizer's state.
        collections: every other variable collection of the model, by name ('batch_stats', ...).
        metrics: accumulators since the last log row; saved, so that a resumed run writes the rows
            that the uninterrupted one would have written.
        ema: moving average of `params`, in float32 for half-precision ones; or None.
        loss_scale: the dynamic loss scale, or None.
        health: whether the run is healthy; None in checkpoints, and if it is not checked.
        carry: what a source that makes its batches with the model has returned last; None for any
            other source.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    collections: dict[str, Any]
    metrics: Any
    ema: Any = None
    loss_scale: LossScale | None = None
    health: Health | None = None
    carry: Any = None

    def __repr__(self) -> str:
        """Returns the step and the sizes of the parts, without their arrays."""
        step = self.step
        # A traced or deleted one has no value.
        known = isinstance(step, np.ndarray | np.integer | int) or (
            isinstance(step, jax.Array)
            and not isinstance(step, jax.core.Tracer)
            and not step.is_deleted()
            and step.is_fully_addressable
        )
        number = f'{np.asarray(step).max():,}' if known else '?'
        parts = ('params', 'opt_state', 'collections', 'ema')
        sizes = {part: _count(getattr(self, part)) for part in parts}
        text = ', '.join(f'{part} {size:,}' for part, size in sizes.items() if size)
        return f'TrainState(step={number}; numbers in {text})'

    @property
    def durable(self) -> TrainState:
        """The state as in a checkpoint: without health, because only healthy states are saved."""
        return dataclasses.replace(self, health=None)

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters and collections as Linen's `apply` takes them."""
        return {'params': self.params, **self.collections}

    @property
    def average(self) -> Any:
        """The moving average in the dtypes of the parameters, for the model; or None."""
        if self.ema is None:
            return None
        return jax.tree.map(_cast_like, self.params, self.ema)

    def revert_if(self, condition: jax.Array, old: TrainState, fields: Sequence[str]) -> TrainState:
        """Returns the state, with some fields of an older one if a condition holds.

        Args:
            condition: bool scalar.
            old: the older state.
            fields: names of the fields to revert.
        """
        kept = {name: choose(condition, getattr(old, name), getattr(self, name)) for name in fields}
        return dataclasses.replace(self, **kept)

    def apply_gradients(
        self, *, grads: Any, tx: optax.GradientTransformation, **changes: Any
    ) -> TrainState:
        """Returns the state after one update, with `step` + 1.

        Args:
            grads: pytree like `params`.
            tx: the optimizer that initialized `opt_state`.
            **changes: other fields to replace, such as `ema`, which otherwise keeps its value; the
                name of a collection replaces that collection.
        """
        # As in Flax's own TrainState, whose users pass `batch_stats=...`.
        fields = {field.name for field in dataclasses.fields(self)}
        collections = {name: changes.pop(name) for name in list(changes) if name not in fields}
        changes.setdefault('collections', {**self.collections, **collections})
        updates, opt_state = tx.update(grads, self.opt_state, self.params)
        return dataclasses.replace(
            self,
            step=self.step + 1,
            params=optax.apply_updates(self.params, updates),
            opt_state=opt_state,
            **changes,
        )


def _count(tree: Any) -> int:
    """Returns the number of elements in all arrays of a tree."""
    return sum(math.prod(getattr(x, 'shape', ())) for x in jax.tree.leaves(tree))


def _cast_like(param: Any, mean: Any) -> Any:
    """Returns the average of a parameter in the dtype of the parameter; arrays or their shapes."""
    if mean.dtype == param.dtype:
        return mean
    # Shapes have no `astype`.
    if isinstance(mean, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(mean.shape, param.dtype, sharding=mean.sharding)
    return mean.astype(param.dtype)
