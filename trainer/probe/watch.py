# SPDX-License-Identifier: Apache-2.0
"""`config.guard.non_finite='stop'`: ends a run whose step has found that it is not sound.

The check itself is in the step (`trainer.step.health`). Here the host reads its result, when the
devices have it anyway or before something is kept, and says what was found.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.errors import UserError
from trainer.parallel.host import fetch
from trainer.prefetch import Prefetcher
from trainer.probe import guard
from trainer.probe.guard import NonFiniteError
from trainer.step import health as lib
from trainer.step.checks import complain
from trainer.step.health import Health
from trainer.step.state import TrainState

if TYPE_CHECKING:
    from trainer.parts import Parts

_WHAT = {
    lib.LOSS: 'the loss',
    lib.GRADIENT: 'a gradient',
    lib.PARAMETER: 'a parameter',
    lib.SLOT: "the optimizer's state",
}


class Watch:
    """Reads the health of a run, and ends the run if it is not sound.

    Attributes:
        batches: those that the run reads, or None.
    """

    def __init__(self, parts: Parts, look: guard.Look, say: Callable[[str], None]):
        """Has seen nothing yet.

        Args:
            parts: the run's programs, data and checkpoints.
            look: finds where in a step something is not finite.
            say: shows a message to the user.
        """
        self._parts = parts
        self._look = look
        self._say = say
        self.batches: Prefetcher | None = None
        self._pending: Health | None = None
        # A bad step shows at the event after it, or at the one after that.
        self._places: collections.deque[tuple[int, Any]] = collections.deque(maxlen=3)
        self._named: set[int] = set()
        # The step donates its own.
        self._copy = jax.jit(lambda health: jax.tree.map(jnp.copy, health))

    def keep_place(self, step: int, place: Any) -> None:
        """Remembers where a stream is after a step, to read it again from there."""
        self._places.append((step, place))

    def note(self, state: TrainState) -> None:
        """Takes the health after a step; `poll` looks at it once the step is done."""
        self._pending = self._copy(state.health)

    def poll(self, state: TrainState) -> None:
        """Looks at what was noted, if its step is done; does not wait.

        Raises:
            NonFiniteError: if the run is not sound; see `check`.
        """
        if self._pending is not None and self._pending.bad_step.is_ready():  # type: ignore[attr-defined]
            pending, self._pending = self._pending, None
            self._judge(pending, state)

    def check(self, state: TrainState) -> None:
        """Waits for the state's step, and makes sure that it is sound.

        Args:
            state: after the step.

        Raises:
            NonFiniteError: if a value is not finite, naming the step and where it began; of an
                ensemble if no member is sound.
            UserError: if a label is out of its range.
        """
        self._pending = None
        assert state.health is not None
        self._judge(state.health, state)

    def _judge(self, health: Health, state: TrainState) -> None:
        bad_step, kind, value = (
            np.atleast_1d(x) for x in fetch((health.bad_step, health.kind, health.value))
        )
        bad = np.flatnonzero(bad_step)
        if not len(bad):
            return
        for each in bad[kind[bad] >= lib.LABELS]:
            self._refuse(int(kind[each]) - lib.LABELS, int(value[each]), int(bad_step[each]))
        if self._parts.experiment.ensemble is None:
            self._stop(int(kind[0]), int(bad_step[0]), state)
        for member in bad:
            self._name(int(member), int(kind[member]), int(bad_step[member]))
        if len(bad) == len(bad_step):
            raise NonFiniteError('No member of the ensemble is left: all have diverged.')

    def _name(self, member: int, kind: int, step: int) -> None:
        if member in self._named:
            return
        self._named.add(member)
        ensemble = self._parts.experiment.ensemble
        assert ensemble is not None
        self._say(
            f'Warning: member {member} ({ensemble.describe(member)}) has diverged: {_WHAT[kind]} '
            f'was not finite in step {step:,}. It stays as it was before that step; the others '
            'train on.'
        )

    def _stop(self, kind: int, bad_step: int, state: TrainState) -> NoReturn:
        checkpoints = self._parts.checkpoints
        newest = None if checkpoints is None else checkpoints.latest()
        saved = 'No checkpoint was saved.'
        if newest is not None:
            saved = f'The newest checkpoint is of step {newest:,}.'
        lines = [
            f'the run has diverged: {_WHAT[kind]} is not finite. '
            f'Last finite step: {bad_step - 1:,}. First non-finite step: {bad_step:,}.',
            saved,
            self._explain(kind, bad_step, state),
        ]
        raise NonFiniteError('\n'.join(lines))

    def _explain(self, kind: int, bad_step: int, state: TrainState) -> str:
        if kind in (lib.PARAMETER, lib.SLOT):
            tree = state.params if kind == lib.PARAMETER else state.opt_state
            return f'{guard.UPDATE_ALONE} Not finite: {_first_bad(tree)}.'
        if kind == lib.GRADIENT and state.loss_scale is not None:
            assert state.health is not None
            skips, scale = fetch((state.health.skips, state.loss_scale.scale))
            return (
                f'The loss scale has skipped {int(skips)} updates in a row, and is down to '
                f'{float(scale):g}. Look for values that float16 cannot hold, above 65,504.'
            )
        batch = self._batch(bad_step)
        if batch is None:
            return 'Where it began is not known: the data is a stream that cannot be read again.'
        # The state is as the bad step has found it, but for the number of the step.
        before = dataclasses.replace(
            state, step=jnp.full_like(state.step, bad_step - 1), metrics=None, health=None
        )
        return guard.explain(*fetch(self._look(before, batch)))

    def _batch(self, step: int) -> Any:
        """Returns the batch of a step, read again; None if it cannot be."""
        data, start = self._parts.experiment.data, step - 1
        if hasattr(data, 'restore'):
            places = [(at, place) for at, place in self._places if at < step]
            if not places or (places[-1][1] is None and places[-1][0] > 0):
                return None
            if self.batches is not None:
                self.batches.close()
            start, place = places[-1]
            data.restore(start, place)
        with guard.read_again(self._parts, start, step) as batches:
            return [batch for _, batch in batches][-1]

    def _refuse(self, number: int, value: int, step: int) -> NoReturn:
        data = self._parts.experiment.data
        blocks = [] if hasattr(data, 'restore') else [data.block(step - 1, 1)]
        checks = self._look.checks
        raise UserError(complain('config.task', f'step {step:,}', checks, number, value, blocks))


def _first_bad(tree: Any) -> str:
    """Returns the paths of the first leaves that are not finite."""
    flags = fetch(jax.jit(guard.each_finite)(tree))
    bad = [path for path, fine in flags.items() if not fine]
    return ', '.join(bad[:3]) + (f' and {len(bad) - 3} more' if len(bad) > 3 else '')
