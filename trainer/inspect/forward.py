# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a train step as a separate function, with recorded module calls."""

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
from trainer.parallel.mesh import batch_shards, replicated_sharding
from trainer.parallel.sharding import Rule, named_axes
from trainer.step.accumulation import split_micro_batches
from trainer.step.state import TrainState
from trainer.tasks.runner import TaskRunner
from trainer.tasks.task import TaskOutput

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """Runs the task as the next train step would: in training, with its RNG keys and micro-batches.

    Attributes:
        model: the model's functional interface.
        task: computes losses and metrics.
        seed: the run's seed.
        accumulate: number of micro-batches.
        mesh: the device mesh.
        sharding: the rules of `config.sharding`, for activations with named axes.
    """

    model: Functional
    task: TaskRunner
    seed: int
    accumulate: int
    mesh: Mesh
    sharding: tuple[Rule, ...]

    @classmethod
    def from_experiment(
        cls, experiment: Experiment, mesh: Mesh, task: TaskRunner | None = None
    ) -> Forward:
        """Returns the forward pass of an experiment's train step.

        Args:
            experiment: what is trained.
            mesh: the device mesh.
            task: the task of the programs, which knows the batch fields that stay on the host.
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
        micro_batches: int | None = None,
    ) -> list[TaskOutput]:
        """Returns the task's output for each micro-batch.

        Args:
            recorder: records the calls of the model's modules.
            state: the train state, for its variables.
            batch: arrays (examples, ...), or their shapes.
            micro_batches: number of micro-batches to run; all by default.
        """
        outputs, variables = [], state.variables
        for index in range(micro_batches or self.accumulate):
            keys = Keys(seed=self.seed, mode='train', step=state.step, index=index)
            model = RecordedModel(self.model, recorder).bind(variables, keys, ema=state.average)
            outputs.append(self.task(model, self._micro_batch(batch, index)))
            # As in a step, each micro-batch sees the batch statistics that the one before it has
            # updated.
            variables = {**variables, **model.collections}
        return outputs

    def _micro_batch(self, batch: Batch, index: int) -> Batch:
        if self.accumulate == 1:
            return batch
        # The same division as in the step, so that micro-batch i has the same examples.
        micro_batches = split_micro_batches(batch, self.accumulate, batch_shards(self.mesh))
        return jax.tree.map(lambda x: x[index], micro_batches)

    def shapes(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns the output shapes of a function that calls the model."""
        with named_axes(self.sharding, self.mesh):
            return jax.eval_shape(function, *args)

    def jaxpr(self, function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        """Returns the jaxpr of a function that calls the model, and the shapes of its result."""
        with named_axes(self.sharding, self.mesh):
            return jax.make_jaxpr(function, return_shape=True)(*args)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function of (state, batch) that compiles at its first call.

        Its results are replicated. With `stacked=True` the batch is a stack of the batches of
        several fused steps, of which the last one is used.
        """

        def run(stacked: bool, state: TrainState, batch: Batch) -> Any:
            return function(state, jax.tree.map(lambda x: x[-1], batch) if stacked else batch)

        # Replicated: every process can fetch the results without a further collective.
        jitted = jax.jit(run, static_argnums=0, out_shardings=replicated_sharding(self.mesh))

        def call(state: TrainState, batch: Batch, *, stacked: bool = False) -> Any:
            with named_axes(self.sharding, self.mesh):
                return jitted(stacked, dataclasses.replace(state, metrics=None), batch)

        return functools.wraps(function)(call)
