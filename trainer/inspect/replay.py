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
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from trainer.ensemble.step import member_state
from trainer.input.prefetch import Prefetcher
from trainer.inspect.explain import each_finite, explain, flags
from trainer.inspect.forward import Batch, Forward
from trainer.modules.recorder import Tap
from trainer.parallel.host import fetch
from trainer.parallel.mesh import batch_shards
from trainer.step.context import StepContext
from trainer.step.finite import all_finite
from trainer.step.state import TrainState
from trainer.step.train_step import default_step, gradients
from trainer.tasks.checks import Check
from trainer.tasks.task import TaskOutput

if TYPE_CHECKING:
    from trainer.run.setup import Parts


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


class Replay:
    """Keeps copies of states, and reruns the steps after one."""

    def __init__(self, parts: Parts, look: Look):
        """Makes a replay; nothing is kept yet.

        Args:
            parts: the run's programs and data.
            look: finds where in a step a value is not finite.
        """
        self._parts = parts
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
        ends: bool = False,
    ) -> str:
        """Describes the first step up to `stop` with a non-finite value, and where it is.

        Args:
            kept: a sound state.
            stop: number of a step after which the state is not.
            is_bad: whether a state is not sound.
            ends: whether the run ends here, and no longer reads its data.
        """
        step, state, data = kept.step, kept.state, self._parts.experiment.data
        assert state is not None
        if hasattr(data, 'restore'):
            if not ends or (kept.place is None and step > 0):
                return (
                    f'Last known finite step: {step:,}. Where it began is unknown: the data is '
                    'a stream, which cannot be reread during the run.'
                )
            data.restore(step, kept.place)
        with read_again(self._parts, step, stop, ends=ends) as batches:
            for number, (_, batch) in enumerate(batches, start=step + 1):
                look = self._look(state, batch)
                empty = self._parts.programs.empty_metrics()
                state = self._parts.programs.step(dataclasses.replace(state, metrics=empty), batch)
                if is_bad(state):
                    return (
                        f'Last finite step: {number - 1:,}. First non-finite step: {number:,}.\n'
                        + explain(*fetch(look))
                    )
        return (
            f'Last finite step: {step:,}. When the {stop - step:,} steps since then were rerun, '
            'all values were finite: these steps are not deterministic.'
        )


class Look:
    """Reruns a step's forward and backward pass, and flags what is not finite in them."""

    def __init__(self, parts: Parts, forward: Forward):
        """Nothing is compiled yet.

        Args:
            parts: the run's programs and data.
            forward: the forward pass of the train step.
        """
        self._parts = parts
        self._forward = forward

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        """Returns the input of `explain`, on the devices, for a state and the batch of its step."""
        return self._compiled(state, batch)

    @property
    def checks(self) -> Mapping[str, Check]:
        """The checks of the task's output, by batch key."""
        state = self._parts.programs.abstract
        if self._parts.experiment.ensemble is not None:
            state = jax.eval_shape(lambda stacked: member_state(stacked, 0), state)
        spec = self._parts.programs.fields.shapes

        def run(state: TrainState, batch: Batch) -> TaskOutput:
            return self._forward(Tap(), state, batch, slices=1)[0]

        return self._forward.shapes(run, dataclasses.replace(state, metrics=None), spec).checks

    @functools.cached_property
    def _compiled(self) -> Any:
        def run(state: TrainState, batch: Batch) -> Any:
            tap = Tap(flags)
            outputs = self._forward(tap, state, batch)
            losses = all_finite([(o.loss, o.penalties) for o in outputs])
            grads = self._gradients(state, batch)
            return tap.found, losses, each_finite(grads), each_finite(dict(batch))

        return self._forward.compiled(run)

    def _gradients(self, state: TrainState, batch: Batch) -> Any:
        experiment = self._parts.experiment
        if experiment.step is not default_step:
            return {}  # A custom step computes its own gradients.
        context = StepContext(
            model=experiment.model,
            task=self._forward.task,
            optimizer=experiment.optimizer,
            seed=experiment.seed,
            accumulate=experiment.accumulate,
            shards=batch_shards(self._parts.mesh),
        )
        return gradients(state, batch, context)[0]


def read_again(parts: Parts, start: int, stop: int, *, ends: bool) -> Prefetcher:
    """Returns the batches of the steps from `start` up to `stop`, read again.

    Args:
        parts: the run's data and mesh.
        start: position of the first one.
        stop: position behind the last one.
        ends: whether the run no longer reads its data, so that the loader is closed afterwards.
    """
    release = getattr(parts.experiment.data, 'close', None) if ends else None
    rows = parts.experiment.clock.batch_size
    calls = itertools.repeat(1, stop - start)
    block = parts.experiment.data.block
    fields = parts.programs.fields
    return Prefetcher.on_mesh(
        block, calls, parts.mesh, rows, fields=fields, start=start, release=release
    )
