# SPDX-License-Identifier: Apache-2.0
"""Reruns the steps since a finite state, to find where a value is first not finite.

A run is checked late, when later steps have spread the non-finite values. Training is a function of
the state and of the position in the data, so it can be rerun one step at a time.
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
from trainer.inspect.explain import each_finite, explain, flags
from trainer.inspect.forward import Batch, Forward
from trainer.modules.recorder import ModuleRecorder
from trainer.parallel.host import fetch
from trainer.parallel.mesh import batch_shards
from trainer.run.setup import Setup
from trainer.step.context import StepContext
from trainer.step.finite import all_finite
from trainer.step.programs import Programs
from trainer.step.state import TrainState
from trainer.step.train_step import default_step, gradients
from trainer.tasks.checks import Check
from trainer.tasks.task import TaskOutput


@dataclasses.dataclass(frozen=True)
class Kept:
    """A state from which steps can be rerun.

    Attributes:
        step: number of completed updates.
        state: a copy, or None: then only the place is known.
        place: position of a stream, None for data that is a function of the step.
    """

    step: int
    state: TrainState | None
    place: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """Rereads batches that a run has read before.

    Attributes:
        data: the training data.
        mesh: the device mesh.
        batch_size: rows of the global batch.
        fields: those that are sent to the devices.
    """

    data: TrainData
    mesh: Mesh
    batch_size: int
    fields: Fields

    def __call__(self, start: int, stop: int, *, ends: bool) -> Prefetcher:
        """Returns the batches of the steps from `start` up to `stop`.

        Args:
            start: position of the first one.
            stop: position behind the last one.
            ends: whether the run no longer reads its data, so that the loader is closed afterwards.
        """
        return Prefetcher(
            self.data.block,
            itertools.repeat(1, stop - start),
            self.mesh,
            self.batch_size,
            fields=self.fields,
            start=start,
            release=self.data.close if ends else None,
        )


class Replay:
    """Keeps copies of states, and reruns the steps after one."""

    def __init__(self, programs: Programs, reader: Reader, look: Look):
        """Makes a replay; nothing is kept yet.

        Args:
            programs: of the training.
            reader: rereads batches.
            look: finds where in a step a value is not finite.
        """
        self._programs = programs
        self._reader = reader
        self._look = look
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))

    def keep(self, step: int, state: TrainState, place: Any = None) -> Kept:
        """Returns a copy of a state: the step donates its own."""
        return Kept(step, self._copy(state), place)

    def find(
        self,
        kept: Kept,
        stop: int,
        is_bad: Callable[[TrainState], bool],
        *,
        what: Callable[[TrainState], str] = lambda _: '',
        ends: bool = False,
    ) -> str:
        """Describes the first step up to `stop` with a non-finite value, and where it is.

        Args:
            kept: a sound state.
            stop: number of a step after which the state is not.
            is_bad: whether a state is not sound.
            what: says which of its values are not, as `explain` is told.
            ends: whether the run ends here, and no longer reads its data.
        """
        step, state, data = kept.step, kept.state, self._reader.data
        assert state is not None
        if data.is_stream:
            if not ends or (kept.place is None and step > 0):
                return (
                    f'Last known finite step: {step:,}. Where it began is unknown: the data is '
                    'a stream, which cannot be reread during the run.'
                )
            data.restore(step, kept.place)
        with self._reader(step, stop, ends=ends) as batches:
            for number, batch in enumerate(batches, start=step + 1):
                look = self._look(state, batch.arrays)
                empty = self._programs.empty_metrics()
                state = dataclasses.replace(state, metrics=empty)
                state = self._programs.step(state, batch.arrays)
                if is_bad(state):
                    return (
                        f'Last finite step: {number - 1:,}. First non-finite step: {number:,}.\n'
                        + explain(*fetch(look), after=what(state))
                    )
        return (
            f'Last finite step: {step:,}. When the {stop - step:,} steps since then were rerun, '
            'all values were finite: these steps are not deterministic.'
        )


class Look:
    """Reruns a step's forward and backward pass, and flags what is not finite in them."""

    def __init__(self, experiment: Experiment, setup: Setup, forward: Forward):
        """Nothing is compiled yet.

        Args:
            experiment: what is trained.
            setup: its mesh and programs.
            forward: the forward pass of the train step.
        """
        self._experiment = experiment
        self._mesh, self._programs = setup.mesh, setup.programs
        self._forward = forward

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        """Returns the input of `explain`, on the devices, for a state and the batch of its step."""
        return self._compiled(state, batch)

    @property
    def checks(self) -> Mapping[str, Check]:
        """The checks of the task's output, by batch key."""
        state = self._programs.abstract
        if self._experiment.ensemble is not None:
            state = jax.eval_shape(lambda stacked: member_state(stacked, 0), state)
        spec = self._programs.fields.shapes

        def run(state: TrainState, batch: Batch) -> TaskOutput:
            return self._forward(ModuleRecorder(), state, batch, slices=1)[0]

        return self._forward.shapes(run, dataclasses.replace(state, metrics=None), spec).checks

    @functools.cached_property
    def _compiled(self) -> Any:
        def run(state: TrainState, batch: Batch) -> Any:
            recorder = ModuleRecorder(flags)
            outputs = self._forward(recorder, state, batch)
            losses = all_finite([(o.loss, o.penalties) for o in outputs])
            grads = self._gradients(state, batch)
            return recorder.records, losses, each_finite(grads), each_finite(dict(batch))

        return self._forward.compiled(run)

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
