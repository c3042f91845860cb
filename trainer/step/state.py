# SPDX-License-Identifier: Apache-2.0
"""The training state: all that changes from step to step, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import optax


@flax.struct.dataclass
class TrainState:
    """A pytree that is donated to every step and saved in every checkpoint.

    Attributes:
        step: int32 scalar, batches attempted so far.
        params: nested dict of parameters, without axis metadata.
        opt_state: the optimizer's state.
        collections: every other variable collection of the model, by name ('batch_stats', ...).
        metrics: accumulators since the last log row; saved, so that a resumed run writes the rows
            that the uninterrupted one would have written.
        ema: moving average of `params`, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    collections: dict[str, Any]
    metrics: Any
    ema: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters and collections as Linen's `apply` takes them."""
        return {'params': self.params, **self.collections}

    def apply_gradients(
        self, *, grads: Any, tx: optax.GradientTransformation, **changes: Any
    ) -> TrainState:
        """Returns the state after one update: `step` + 1, and every other change at once.

        Args:
            grads: pytree like `params`.
            tx: the optimizer that made `opt_state`.
            **changes: other fields to replace; the name of a collection replaces that collection.
        """
        updates, opt_state = tx.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        fields = {field.name for field in dataclasses.fields(self)}
        collections = {name: changes.pop(name) for name in list(changes) if name not in fields}
        changes.setdefault('collections', {**self.collections, **collections})
        return dataclasses.replace(
            self, step=self.step + 1, params=params, opt_state=opt_state, **changes
        )
