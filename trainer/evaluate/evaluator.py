# SPDX-License-Identifier: Apache-2.0
"""Evaluates a whole split: every example once, for any batch size and number of devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from trainer.modules.linen import Linen
from trainer.parallel.mesh import batch_sharding, replicated
from trainer.prefetch import Prefetcher
from trainer.step.metrics import Count, to_floats
from trainer.step.rng import Keys
from trainer.step.state import TrainState
from trainer.step.task_runner import MASK, TaskRunner, compute_metrics, merge_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalStep:
    """One batch of an evaluation, as a pure function that accumulates on the devices.

    Attributes:
        model: the model's functional interface.
        task: what the model is asked to do with a batch.
        seed: the run's seed, for tasks that draw random numbers at evaluation.
    """

    model: Linen
    task: TaskRunner
    seed: int

    def empty(self, variables: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns accumulators that have seen nothing."""
        output = jax.eval_shape(self._output, variables, batch, 0, 0)
        return {'task': self.task.empty(output), 'examples': Count.empty()}

    def __call__(
        self,
        totals: dict[str, Any],
        variables: Mapping[str, Any],
        step: jax.Array,
        index: jax.Array,
        batch: Mapping[str, jax.Array],
    ) -> dict[str, Any]:
        """Returns the totals with this batch's real rows added.

        Args:
            totals: what `empty` or an earlier call returned; donated.
            variables: parameters and collections.
            step: int32 scalar, the state's step.
            index: int32 scalar, the batch's number.
            batch: arrays (rows, ...), `_mask` among them.
        """
        output = self._output(variables, batch, step, index)
        new = {
            'task': self.task.measure(output),
            'examples': Count.from_model_output(batch[MASK]),
        }
        return merge_metrics(totals, new)

    def _output(self, variables: Any, batch: Any, step: Any, index: Any) -> Any:
        keys = Keys(seed=self.seed, mode='eval', step=step, index=index)
        return self.task(self.model.bind(variables, keys), batch)


class Evaluator:
    """Runs an EvalStep over all batches of a loader, compiled once.

    Attributes:
        name: the evaluation's name in the config.
        use_ema: whether it evaluates the moving average of the parameters.
    """

    def __init__(self, name: str, step: EvalStep, loader: Any, mesh: Mesh, *, use_ema: bool):
        self.name = name
        self.use_ema = use_ema
        self._step = step
        self._loader = loader
        self._mesh = mesh
        everywhere = replicated(mesh)
        self._compiled = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
        self._empty = jax.jit(step.empty, out_shardings=everywhere)

    def variables(self, state: TrainState) -> dict[str, Any]:
        """Returns what this evaluator reads of the state."""
        return {**state.variables, 'params': state.ema} if self.use_ema else state.variables

    def run(self, state: TrainState) -> dict[str, float | int]:
        """Returns the metrics over the split, `examples` (the number of them) included."""
        variables = self.variables(state)
        totals: Any = None
        with Prefetcher(
            self._loader.block, 0, self._loader.num_batches, batch_sharding(self._mesh)
        ) as batches:
            for index, batch in enumerate(batches):
                if totals is None:
                    totals = self._empty(variables, batch)
                totals = self._compiled(totals, variables, state.step, np.int32(index), batch)
        return summarise(totals)


def summarise(totals: Any) -> dict[str, float | int]:
    """Returns flat host numbers of an evaluation's accumulators."""
    computed = compute_metrics(totals)
    return to_floats({**computed['task'], 'examples': computed['examples']})
