# SPDX-License-Identifier: Apache-2.0
"""`config.guard`: finds where a loss, a gradient or a parameter has first become NaN or infinite.

The numbers of a run are looked at late, when every later step has spread the damage. So the guard
keeps a copy of the last good state, and when a row is bad it runs the steps since then again, one
by one: training is a function of the state and of the position in the data.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from trainer.modules.bound import param_path
from trainer.modules.tap import ROOT, Tap, in_order, is_float
from trainer.observe.reporter import flat_row
from trainer.parallel.host import fetch
from trainer.parallel.mesh import batch_shards
from trainer.prefetch import Prefetcher
from trainer.probe.forward import Batch, Forward
from trainer.step.context import default_step
from trainer.step.gradients import Gradients
from trainer.step.loss_scale import all_finite
from trainer.step.state import TrainState

if TYPE_CHECKING:
    from trainer.parts import Parts


class NonFiniteError(RuntimeError):
    """A run has been stopped because a value was not finite; the message says where it began."""

    exit_code = 1


class Guard:
    """Checks a run at each of its events, and explains what is not finite."""

    def __init__(self, parts: Parts, forward: Forward, *, stops: bool):
        """Keeps nothing yet.

        Args:
            parts: the run's programs and data.
            forward: the forward pass of the train step.
            stops: whether a run ends where something is not finite.
        """
        self._parts = parts
        self._forward = forward
        self._stops = stops
        self._kept: tuple[int, TrainState, Any] | None = None
        self._done = False

    def keep(self, step: int, state: TrainState, place: Any = None) -> None:
        """Keeps a copy of a state, for the step donates its own; and where a stream stands."""
        self._kept = (step, self._copy(state), place)

    def check(
        self, step: int, state: TrainState, row: Mapping[str, float], batches: Prefetcher
    ) -> str | None:
        """Keeps the state if all is well.

        Args:
            step: number of completed updates.
            state: at this step.
            row: the newest value of each metric, by flat name.
            batches: those of the run, counted up to this step.

        Returns:
            What the user should know, once, unless the run stops.

        Raises:
            NonFiniteError: if something is not finite and the run stops there.
        """
        if self._done:
            return None
        bad = non_finite(row)
        if not bad and self._is_sound(state):
            self.keep(step, state, batches.state)
            return None
        self._done = True
        what = f'{bad[0]} of step {step:,} is' if bad else f'a parameter after step {step:,} is'
        message = f'{what} not finite.\n{self._explain(step, batches)}'
        self._kept = None
        if self._stops:
            raise NonFiniteError(message)
        return f'config.guard: {message}\nThe run goes on.'

    def _explain(self, stop: int, running: Prefetcher) -> str:
        """Runs the steps since the last good state again, until one is not sound."""
        assert self._kept is not None
        step, state, place = self._kept
        data = self._parts.experiment.data
        if hasattr(data, 'restore'):
            if not self._stops or (place is None and step > 0):
                return (
                    f'All was well at step {step:,}. Where it began is not known: the data is a '
                    'stream, which cannot be read again while the run goes on.'
                )
            running.close()
            data.restore(step, place)
        with self._batches(step, stop) as batches:
            for number, (_, batch) in enumerate(batches, start=step + 1):
                look = self._look(state, batch)
                empty = self._parts.programs.empty_metrics()
                state = self._parts.programs.step(dataclasses.replace(state, metrics=empty), batch)
                if non_finite(flat_row(state.metrics)) or not self._is_sound(state):
                    found = fetch(look)
                    return f'All was well at step {step:,}; it began in step {number:,}.\n' + (
                        explain(*found)
                    )
        return (
            f'All was well at step {step:,}, and when the {stop - step:,} steps since then were '
            'run again nothing was wrong: they are not deterministic.'
        )

    def _batches(self, start: int, stop: int) -> Prefetcher:
        # Beside the run's own, which may go on: so the loader is not closed.
        parts = self._parts
        rows = parts.experiment.clock.batch_size
        calls = itertools.repeat(1, stop - start)
        block = parts.experiment.data.block
        fields = parts.programs.fields
        return Prefetcher.on_mesh(block, calls, parts.mesh, rows, fields=fields, start=start)

    @functools.cached_property
    def _look(self) -> Any:
        """Returns for (state, batch) the flags that `explain` reads."""

        def run(state: TrainState, batch: Batch) -> Any:
            tap = Tap(_flags)
            outputs = self._forward(tap, state, batch)
            losses = all_finite([(o.loss, o.penalties) for o in outputs])
            grads = self._gradients(state, batch)
            return tap.found, losses, _each_finite(grads), _each_finite(dict(batch))

        return self._forward.compiled(run)

    def _gradients(self, state: TrainState, batch: Batch) -> Any:
        experiment = self._parts.experiment
        if experiment.step is not default_step:
            return {}  # A step of the user's own has gradients of its own.
        gradients = Gradients(
            model=experiment.model,
            task=self._forward.task,
            optimizer=experiment.optimizer,
            seed=experiment.seed,
            accumulate=experiment.accumulate,
            shards=batch_shards(self._parts.mesh),
        )
        return gradients(state, batch)[0]

    def _is_sound(self, state: TrainState) -> bool:
        return bool(fetch(self._sound((state.params, state.collections))))

    @functools.cached_property
    def _sound(self) -> Any:
        return jax.jit(all_finite)

    @functools.cached_property
    def _copy(self) -> Any:
        return jax.jit(lambda state: jax.tree.map(jnp.copy, state))


def non_finite(row: Mapping[str, float]) -> list[str]:
    """Returns the names of the losses and norms in a row that are not finite.

    A step under a loss scale may have infinite gradients, and so their norm: it is skipped, and
    nothing is wrong.
    """
    watched = ('loss',) if 'train/loss_scale' in row else ('loss', '_norm')
    mine = {name: value for name, value in row.items() if name.startswith('train/')}
    return [n for n, value in mine.items() if n.endswith(watched) and not math.isfinite(value)]


def explain(
    found: list[Any], loss: bool, grads: Mapping[str, bool], batch: Mapping[str, bool]
) -> str:
    """Returns what was the first thing in a step that was not finite.

    Args:
        found: the flags of each call of each module, from a `Tap`.
        loss: whether the losses are finite.
        grads: whether the gradient of each parameter is, by path.
        batch: whether each field of the batch is, by name.
    """
    calls = in_order(found)
    bad = next((number for number, call in enumerate(calls) if not call.seen['output']), None)
    if bad is not None:
        call = calls[bad]
        name = call.name if call.path else f'{ROOT}, the model itself'
        return (
            f'The first module whose output is not finite is {name}, number {bad + 1} of '
            f'{len(calls)} in the order of the calls: {_blame(call.seen, _not(batch))}'
        )
    if not loss:
        return (
            'The output of every module is finite, and the loss is not: it is the task '
            f'that makes it so{_in_batch(_not(batch))}. A label that is not below the number of '
            'classes does, or the logarithm of 0.'
        )
    if wrong := _not(grads):
        more = f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''
        return (
            'The loss and the output of every module are finite, the gradients are not: '
            f'{", ".join(wrong[:5])}{more}. Look for what has no derivative where it was '
            'computed: a square root or a norm of zero, a division that `where` hides.'
        )
    return (
        'The loss and all gradients are finite: it is the update that is not. Look at the learning '
        'rate and the optimizer.'
    )


def _blame(flags: Mapping[str, Any], fields: Sequence[str]) -> str:
    if not flags['variables']:
        return 'its parameters, or statistics, already were not.'
    if not flags['input']:
        return f'its input already was not{_in_batch(fields)}, while its parameters were finite.'
    return 'its input and its parameters were finite.'


def _in_batch(fields: Sequence[str]) -> str:
    return f' (and so is {", ".join(fields)} in the batch)' if fields else ''


def _not(flags: Mapping[str, bool]) -> list[str]:
    return [name for name, fine in flags.items() if not fine]


def _flags(output: Any, inputs: Any, variables: Any) -> dict[str, jax.Array]:
    return {
        'output': all_finite(output),
        'input': all_finite(inputs),
        'variables': all_finite(variables),
    }


def _each_finite(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {param_path(p): jnp.all(jnp.isfinite(x)) for p, x in leaves if is_float(x)}
