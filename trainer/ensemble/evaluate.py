# SPDX-License-Identifier: Apache-2.0
"""Evaluates an ensemble on a batch, as one model and as single members."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.ensemble.step import PerMember
from trainer.evaluate.step import EMA, EvalStep
from trainer.modules.ensemble import EnsembleModel
from trainer.modules.ensemble_outputs import mean
from trainer.modules.rng import Keys
from trainer.parallel.host import fetch
from trainer.step.health import Health
from trainer.tasks.metrics import merge_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleEvalStep(EvalStep):
    """An `EvalStep` whose variables have a dimension for the members before all others.

    The task sees all members as one model, whose call returns what the task's `combine` makes of
    their outputs; without one it is their mean.

    Attributes:
        seeds: of each member.
        axis: mesh axis that the members are spread over, or None.
        counted: indices of the members that make up the ensemble; empty for all. Each member is
            evaluated for itself in any case.
    """

    seeds: tuple[int, ...]
    axis: str | None = None

    def without_diverged(self, health: Health) -> EnsembleEvalStep:
        """Returns the step for the members that have not diverged; for all, if all have."""
        sound = np.flatnonzero(~fetch(health.is_bad))
        counted = () if len(sound) == len(self.seeds) else tuple(map(int, sound))
        return dataclasses.replace(self, counted=counted)

    def output_shapes(self, variables: Any, batch: Any) -> Any:
        """Returns the shapes of the task's output for the ensemble and for a member."""
        one = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), variables)
        return super().output_shapes(variables, batch), self._alone.output_shapes(one, batch)

    def empty(self, output: Any) -> dict[str, Any]:
        """Returns accumulators that have seen nothing, for outputs of these shapes."""
        together, alone = output
        empty = self.task.empty(alone)
        shape = (len(self.seeds),)
        stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (*shape, *x.shape)), empty)
        return {**super().empty(together), 'members': PerMember(stacked)}

    def __call__(
        self,
        totals: dict[str, Any],
        variables: Mapping[str, Any],
        step: jax.Array,
        index: jax.Array,
        batch: Mapping[str, jax.Array],
    ) -> dict[str, Any]:
        """Returns the totals with this batch's real rows added: see `EvalStep`."""

        def member(seed: jax.Array, variables: Any, before: Any) -> Any:
            alone = dataclasses.replace(self._alone, seed=seed)
            output = alone._output(variables, batch, step, index)
            return merge_metrics(before, self.task.measure(output))

        rest = dict(totals)
        before = rest.pop('members').stacked
        seeds = jnp.asarray(self.seeds, jnp.int32)
        stacked = jax.vmap(member, spmd_axis_name=self.axis)(seeds, variables, before)
        together = super().__call__(rest, variables, step, index, batch)
        return {**together, 'members': PerMember(stacked)}

    @property
    def _alone(self) -> EvalStep:
        return EvalStep(model=self.model, task=self.task, seed=self.seeds[0])

    def _bind(self, variables: Mapping[str, Any], keys: Keys) -> EnsembleModel:
        rest = {name: value for name, value in variables.items() if name != EMA}
        return EnsembleModel(
            self.model,
            rest,
            keys,
            jnp.asarray(self.seeds, jnp.int32),
            ema=variables.get(EMA),
            combine=getattr(self.task.task, 'combine', mean),
            axis=self.axis,
            counted=self.counted,
        )
