# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a training step by itself, with a recorder on the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from trainer.experiment import Experiment
from trainer.modules.functional import Functional, RecordedModel
from trainer.modules.recorder import ModuleRecorder
from trainer.modules.rng import Keys
from trainer.parallel.mesh import batch_shards, replicated
from trainer.parallel.sharding import Rule, named_axes
from trainer.step.accumulation import split_rows
from trainer.step.state import TrainState
from trainer.tasks.runner import TaskRunner
from trainer.tasks.task import TaskOutput

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """Runs the task as the next train step on a batch would: its mode, its random keys, its slices.

    Attributes:
        model: the model's functional interface.
        task: what the model is asked to do with a batch.
        seed: the run's seed.
        accumulate: slices that a batch is cut into.
        mesh: the device mesh.
        sharding: the rules that names of activations follow.
    """

    model: Functional
    task: TaskRunner
    seed: int
    accumulate: int
    mesh: Mesh
    sharding: tuple[Rule, ...]

    @classmethod
    def of(cls, experiment: Experiment, mesh: Mesh, task: TaskRunner | None = None) -> Forward:
        """Returns the forward pass of an experiment's train step.

        Args:
            experiment: what is trained.
            mesh: the device mesh.
            task: that of the programs, if some fields of the batch stay on the host.
        """
        return cls(
            model=experiment.model,
            task=task or experiment.task,
            seed=experiment.seed,
            accumulate=experiment.training.accumulate,
            mesh=mesh,
            sharding=experiment.devices.sharding,
        )

    def __call__(
        self,
        recorder: ModuleRecorder,
        state: TrainState,
        batch: Batch,
        *,
        slices: int | None = None,
    ) -> list[TaskOutput]:
        """Returns what the task makes of each slice of a batch.

        Args:
            recorder: looks at the calls of the model.
            state: whose variables.
            batch: arrays (rows, ...), or their shapes.
            slices: how many of the slices; all by default.
        """
        outputs, variables = [], state.variables
        for index in range(slices or self.accumulate):
            keys = Keys(seed=self.seed, mode='train', step=state.step, index=index)
            model = RecordedModel(self.model, recorder).bind(variables, keys, ema=state.average)
            outputs.append(self.task(model, self._slice(batch, index)))
            variables = {**variables, **model.collections}
        return outputs

    def _slice(self, batch: Batch, index: int) -> Batch:
        if self.accumulate == 1:
            return batch
        slices = split_rows(batch, self.accumulate, batch_shards(self.mesh))
        return jax.tree.map(lambda x: x[index], slices)

    def shapes(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns the shapes of what a function returns that calls the model."""
        with named_axes(self.sharding, self.mesh):
            return jax.eval_shape(function, *args)

    def jaxpr(self, function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        """Returns what JAX traces of such a function, and the shapes of its result."""
        with named_axes(self.sharding, self.mesh):
            return jax.make_jaxpr(function, return_shape=True)(*args)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function of (state, batch), compiled at its first call.

        Its results are whole on every device; the batch may be the stack of those of a fused call:
        then the last one counts.
        """

        def run(stacked: bool, state: TrainState, batch: Batch) -> Any:
            return function(state, jax.tree.map(lambda x: x[-1], batch) if stacked else batch)

        jitted = jax.jit(run, static_argnums=0, out_shardings=replicated(self.mesh))

        def call(state: TrainState, batch: Batch, *, stacked: bool = False) -> Any:
            with named_axes(self.sharding, self.mesh):
                return jitted(stacked, dataclasses.replace(state, metrics=None), batch)

        return functools.wraps(function)(call)
