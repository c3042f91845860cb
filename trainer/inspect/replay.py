# SPDX-License-Identifier: Apache-2.0
"""Reruns the steps since a finite state, to find the first non-finite value.

Checks run late, when later steps have spread the non-finite values. Training is a function of the
state and the position in the data, so it can be rerun one step at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from trainer.ensemble.step import member_state
from trainer.experiment import Experiment
from trainer.input.data import TrainData
from trainer.input.fields import Fields
from trainer.input.prefetch import Prefetcher
from trainer.inspect.explain import explain, finite_by_path, flags
from trainer.inspect.forward import Batch, Forward
from trainer.modules.recorder import ModuleRecorder
from trainer.parallel.host import fetch
from trainer.parallel.mesh import batch_shards
from trainer.step.context import StepContext
from trainer.step.finite import all_finite
from trainer.step.programs import Programs
from trainer.step.state import TrainState
from trainer.step.train_step import default_step, gradients
from trainer.tasks.checks import Check
from trainer.tasks.task import TaskOutput


@dataclasses.dataclass(frozen=True)
class ReplayStart:
    """A point from which steps can be rerun.

    Attributes:
        step: number of completed updates.
        state: a copy of the state, or None if only the position in the data is known.
        position: position of a stream; None for data that is a function of the step.
    """

    step: int
    state: TrainState | None
    position: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """Rereads batches that a run has read before.

    Attributes:
        data: loader of the training data, and what is known of it.
        mesh: the device mesh.
        batch_size: examples of the global batch.
        fields: the batch fields that are sent to the devices.
    """

    data: TrainData
    mesh: Mesh
    batch_size: int
    fields: Fields

    def __call__(self, start: int, stop: int, *, ends: bool) -> Prefetcher:
        """Returns the batches of the steps from `start` up to `stop`.

        Args:
            start: number of steps before the first batch.
            stop: number of steps including the last batch.
            ends: whether the run has stopped reading, so that the loader is closed afterwards.
        """
        return Prefetcher(
            self.data.block,
            itertools.repeat(1, stop - start),
            self.mesh,
            self.data.rows(self.batch_size),
            fields=self.fields,
            num_shapes=self.data.num_shapes,
            start=start,
            # During the run the loader is still in use by the run's own prefetcher.
            release=self.data.close if ends else None,
        )


class Replay:
    """Keeps copies of states, and reruns the steps after one."""

    def __init__(self, programs: Programs, reader: Reader, inspector: StepInspector):
        """Compiles nothing yet.

        Args:
            programs: the training programs.
            reader: rereads batches.
            inspector: finds where in a step a value is not finite.
        """
        self._programs = programs
        self._reader = reader
        self._inspector = inspector
        # One program for the whole state: copying leaf by leaf costs a dispatch for each.
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))

    def keep(self, step: int, state: TrainState, position: Any = None) -> ReplayStart:
        """Returns a copy of a state, whose own buffers are donated to the next step."""
        return ReplayStart(step, self._copy(state), position)

    def find(
        self,
        start: ReplayStart,
        stop: int,
        is_bad: Callable[[TrainState], bool],
        *,
        what: Callable[[TrainState], str] = lambda _: '',
        ends: bool = False,
    ) -> str:
        """Describes the first step up to `stop` with a non-finite value, and where it is.

        Args:
            start: a finite state.
            stop: a step after which the state is not finite.
            is_bad: returns whether a state is not finite.
            what: describes the non-finite values of a state, for the argument `after` of `explain`.
            ends: whether the run has stopped reading its data.
        """
        step, state, data = start.step, start.state, self._reader.data
        assert state is not None
        if data.is_stream:
            # The run's prefetcher reads the stream until the run ends, and a stream has one reader.
            # Without a position only its beginning can be found again.
            if not ends or (start.position is None and step > 0):
                return (
                    f'Last known finite step: {step:,}. Where it began is unknown: the data is '
                    'a stream, which cannot be reread during the run.'
                )
            data.restore(step, start.position)
        with self._reader(step, stop, ends=ends) as batches:
            for number, batch in enumerate(batches, start=step + 1):
                # Before the step, which donates the state. Run for every step, because only the
                # state after it shows whether this one was bad.
                inspection = self._inspector(state, batch.arrays)
                empty = self._programs.empty_metrics()
                # Each step gets its own metrics, so that `is_bad` judges this step alone.
                state = dataclasses.replace(state, metrics=empty)
                state = self._programs.step(state, batch.arrays)
                if is_bad(state):
                    return (
                        f'Last finite step: {number - 1:,}. First non-finite step: {number:,}.\n'
                        + explain(*fetch(inspection), after=what(state))
                    )
        return (
            f'Last finite step: {step:,}. When the {stop - step:,} steps since then were rerun, '
            'all values were finite: these steps are not deterministic.'
        )


class StepInspector:
    """Reruns the forward and backward pass of a step, and flags non-finite values in them."""

    def __init__(self, experiment: Experiment, mesh: Mesh, programs: Programs, forward: Forward):
        """Compiles nothing yet.

        Args:
            experiment: what is trained.
            mesh: the device mesh.
            programs: the training programs.
            forward: the forward pass of the train step.
        """
        self._experiment = experiment
        self._mesh, self._programs = mesh, programs
        self._forward = forward

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        """Returns the arguments of `explain`, on the devices, for a state and its next batch."""
        return self._compiled(state, batch)

    def find_checks(self) -> Mapping[str, Check]:
        """Returns the checks of the task's output, by batch key; traces the task."""
        state = self._programs.abstract
        if self._experiment.ensemble is not None:
            state = jax.eval_shape(lambda stacked: member_state(stacked, 0), state)
        spec = self._programs.fields.shapes

        def run(state: TrainState, batch: Batch) -> TaskOutput:
            return self._forward(ModuleRecorder(), state, batch, micro_batches=1)[0]

        return self._forward.shapes(run, dataclasses.replace(state, metrics=None), spec).checks

    @functools.cached_property
    def _compiled(self) -> Any:
        def run(state: TrainState, batch: Batch) -> Any:
            recorder = ModuleRecorder(flags)
            outputs = self._forward(recorder, state, batch)
            # Reduced to flags on the devices: the host must not copy all intermediate values.
            losses = all_finite([(o.loss, o.penalties) for o in outputs])
            grads = self._gradients(state, batch)
            return recorder.records, losses, finite_by_path(grads), finite_by_path(dict(batch))

        return self._forward.compile(run)

    def _gradients(self, state: TrainState, batch: Batch) -> Any:
        experiment = self._experiment
        if experiment.step is not default_step:
            return {}  # A custom step computes its own gradients.
        context = StepContext(
            model=experiment.model,
            task=self._forward.task,
            optimizer=experiment.optimizer,
            seed=experiment.seed,
            accumulate=experiment.training.accumulate,
            shards=batch_shards(self._mesh),
        )
        return gradients(state, batch, context)[0]
