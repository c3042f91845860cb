# SPDX-License-Identifier: Apache-2.0
"""The evaluation step of an ensemble, which measures the ensemble and each member."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.errors import UserError
from trainer.ensemble.step import PerMember
from trainer.evaluate.step import EMA, EvalStep
from trainer.modules.ensemble import EnsembleModel
from trainer.modules.ensemble_outputs import mean
from trainer.modules.rng import Keys
from trainer.parallel.host import fetch
from trainer.step.health import Health
from trainer.tasks.metrics import merge_metrics
from trainer.tasks.task import TaskOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleEvalStep(EvalStep):
    """An `EvalStep` whose variables have a leading dimension for the members.

    The task sees all members as one model, whose call combines their outputs with the task's
    `combine` method, or averages them if there is none.

    Attributes:
        seeds: the seed of each member.
        axis: mesh axis that the members are sharded over, or None.
        counted: indices of the members that make up the ensemble; empty for all. Each member is
            evaluated separately in any case.
    """

    seeds: tuple[int, ...]
    axis: str | None = None

    def without_diverged(self, health: Health) -> EnsembleEvalStep:
        """Returns the step for the members that have not diverged, or for all if all have."""
        # One diverged member would make every mean NaN.
        sound = np.flatnonzero(~fetch(health.is_bad))
        counted = () if len(sound) == len(self.seeds) else tuple(map(int, sound))
        return dataclasses.replace(self, counted=counted)

    def with_fresh(self, fresh: frozenset[str]) -> EnsembleEvalStep:
        """Returns the step unchanged.

        Raises:
            UserError: if there are collections to create for each batch.
        """
        if fresh:
            raise UserError(
                f'its `model` has collections of its own ({", ".join(sorted(fresh))}), which an '
                'ensemble cannot have; evaluate a member by itself: Trainer.model(member=0)'
            )
        return self

    def variables_of_one(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the shapes of the variables of one member."""
        rest = super().variables_of_one(variables)
        return jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), rest)

    def output_shapes(self, variables: Any, batch: Any) -> Any:
        """Returns the shapes of the task's output for the ensemble and for a member."""
        first = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), variables)
        member_output = self._member_step.output_shapes(first, batch)
        return super().output_shapes(variables, batch), member_output

    def empty(self, output: Any) -> dict[str, Any]:
        """Returns empty accumulators for outputs of these shapes."""
        ensemble_output, member_output = output
        empty = self.task.empty(member_output)
        shape = (len(self.seeds),)
        stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (*shape, *x.shape)), empty)
        return {**super().empty(ensemble_output), 'members': PerMember(stacked)}

    def __call__(
        self,
        totals: dict[str, Any],
        variables: Mapping[str, Any],
        step: jax.Array,
        index: jax.Array,
        batch: Mapping[str, jax.Array],
        output: TaskOutput | None = None,
    ) -> dict[str, Any]:
        """Returns the totals including this batch's examples without padding: see `EvalStep`."""

        def measure_member(seed: jax.Array, variables: Any, totals: Any) -> Any:
            member_step = dataclasses.replace(self._member_step, seed=seed)
            member_output = member_step.run(variables, step, index, batch)
            return merge_metrics(totals, self.task.measure(member_output))

        ensemble_totals = dict(totals)
        member_totals = ensemble_totals.pop('members').stacked
        seeds = jnp.asarray(self.seeds, jnp.int32)
        map_members = jax.vmap(measure_member, spmd_axis_name=self.axis)
        stacked = map_members(seeds, variables, member_totals)
        ensemble_totals = super().__call__(ensemble_totals, variables, step, index, batch, output)
        return {**ensemble_totals, 'members': PerMember(stacked)}

    @property
    def _member_step(self) -> EvalStep:
        return EvalStep(model=self.model, task=self.task, seed=self.seeds[0])

    def _bind(self, variables: Mapping[str, Any], keys: Keys, batch: Any) -> EnsembleModel:
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
