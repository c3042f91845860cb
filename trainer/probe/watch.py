# SPDX-License-Identifier: Apache-2.0
"""`config.guard.non_finite='stop'`: ends a run when its step has found a non-finite value.

The check itself is in the step (`trainer.step.health`). Here the host reads its result, when it is
available anyway or before a state is saved, and reports what was found.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from trainer.checkpoint.errors import CheckpointError
from trainer.config.errors import UserError
from trainer.observe.table import nbytes
from trainer.parallel.host import fetch
from trainer.prefetch import Prefetcher
from trainer.probe.explain import UPDATE_ALONE, each_finite, explain
from trainer.probe.guard import NonFiniteError
from trainer.probe.replay import Kept, Look, Replay, read_again
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


# On CPUs, copies of states up to this size are kept, to rerun steps.
_MOST_KEPT_BYTES = 2**28


class Watch:
    """Reads the health of a run, and ends the run if it has diverged.

    On an accelerator every step checks all values, and a bad step does not change the state. On a
    CPU a step checks only its loss, and the rest is checked here, at the run's events; so copies
    of small states are kept there, to name the step and the module all the same.

    Attributes:
        batches: those that the run reads, or None.
    """

    def __init__(self, parts: Parts, look: Look, say: Callable[[str], None]):
        """Makes a watch; `begin` starts it.

        Args:
            parts: the run's programs, data and checkpoints.
            look: finds where in a step a value is not finite.
            say: shows a message to the user.
        """
        self.batches: Prefetcher | None = None
        self._parts = parts
        self._look = look
        self._replay = Replay(parts, look)
        self._say = say
        self._pending: Health | None = None
        # The newest state known to be finite, and one that is not checked yet.
        self._kept: Kept | None = None
        self._next: Kept | None = None
        self._named: set[int] = set()

    def begin(self, step: int, state: TrainState, place: Any) -> None:
        """Sets the state that the run starts from.

        Args:
            step: number of completed updates.
            state: at this step; finite by definition.
            place: position of a stream, or None.
        """
        self._pending, self._kept = None, self._keep(step, state, place)

    def note(self, step: int, state: TrainState, place: Any) -> None:
        """Notes a state; `poll` checks it once its step is done. Arguments as for `begin`."""
        self._pending = self._parts.programs.sweep(state)
        self._next = self._keep(step, state, place)

    def poll(self, state: TrainState) -> None:
        """Checks the noted state, if its step is done; does not wait.

        Raises:
            NonFiniteError: if the run has diverged; see `check`.
        """
        if self._pending is not None and self._pending.packed.is_ready():  # type: ignore[attr-defined]
            pending, self._pending = self._pending, None
            self._judge(pending, state)
            self._kept = self._next

    def check(self, state: TrainState) -> None:
        """Waits for the state's step, and checks that it is finite.

        Args:
            state: after the step.

        Raises:
            NonFiniteError: if a value is not finite, naming the step and where it began; for an
                ensemble, if all members have diverged.
            UserError: if a label is out of its range.
        """
        self._pending = None
        self._judge(self._parts.programs.sweep(state), state)
        self._kept = self._next or self._kept

    def _keep(self, step: int, state: TrainState, place: Any) -> Kept | None:
        """Returns a copy of a state if steps may have to be rerun, otherwise only its place."""
        on_cpu = self._parts.mesh.devices.flat[0].platform == 'cpu'
        if not on_cpu or nbytes(state) > _MOST_KEPT_BYTES:
            return Kept(step, None, place)
        return self._replay.keep(step, state, place)

    def _judge(self, health: Health, state: TrainState) -> None:
        packed = np.atleast_2d(fetch(health.packed))
        bad_step, kind, value = packed[:, 0], packed[:, 1], packed[:, 2]
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
            raise NonFiniteError('all members of the ensemble have diverged.')

    def _name(self, member: int, kind: int, step: int) -> None:
        if member in self._named:
            return
        self._named.add(member)
        ensemble = self._parts.experiment.ensemble
        assert ensemble is not None
        self._say(
            f'Warning: member {member} ({ensemble.describe(member)}) has diverged: {_WHAT[kind]} '
            f'is not finite in step {step:,}. It keeps its state from before that step; the other '
            'members continue training.'
        )

    def _stop(self, kind: int, bad_step: int, state: TrainState) -> NoReturn:
        saved = 'no checkpoint was saved'
        if (checkpoints := self._parts.checkpoints) is not None:
            with contextlib.suppress(CheckpointError):  # Reported when the run ends.
                checkpoints.wait()
            if (newest := checkpoints.latest()) is not None:
                saved = f'the newest checkpoint is of step {newest:,}'
        raise NonFiniteError(
            f'the run has diverged: {_WHAT[kind]} is not finite at step {bad_step:,}; {saved}.\n'
            + self._explain(kind, bad_step, state)
        )

    def _explain(self, kind: int, bad_step: int, state: TrainState) -> str:
        if kind == lib.GRADIENT and state.loss_scale is not None:
            assert state.health is not None
            skips, scale = fetch((state.health.skips, state.loss_scale.scale))
            return (
                f'The loss scale has skipped {int(skips)} updates in a row, and is down to '
                f'{float(scale):g}. Look for values above 65,504, which float16 cannot represent.'
            )
        if self._kept is not None and self._kept.state is not None:
            return self._replay.find(
                self._kept, bad_step, self._is_bad, running=self.batches, ends=True
            )
        if kind in (lib.PARAMETER, lib.SLOT):
            tree = state.params if kind == lib.PARAMETER else state.opt_state
            return f'{UPDATE_ALONE} Not finite: {_first_bad(tree)}.'
        batch = self._batch(bad_step)
        if batch is None:
            return 'Where it began is unknown: the data is a stream that cannot be reread.'
        # The bad step has changed nothing in the state but the step number.
        before = dataclasses.replace(state, step=jnp.full_like(state.step, bad_step - 1))
        return (
            f'Last finite step: {bad_step - 1:,}. First non-finite step: {bad_step:,}.\n'
            + explain(*fetch(self._look(before, batch)))
        )

    def is_sound(self, state: TrainState) -> bool:
        """Waits for a state, and returns whether it is finite; for an ensemble, any member's."""
        health = self._parts.programs.sweep(state)
        return not np.all(fetch(health.is_bad))

    def _is_bad(self, state: TrainState) -> bool:
        return not self.is_sound(state)

    def _batch(self, step: int) -> Any:
        """Rereads the batch of a step; None if that is impossible."""
        data, start = self._parts.experiment.data, step - 1
        if hasattr(data, 'restore'):
            if self._kept is None or (self._kept.place is None and self._kept.step > 0):
                return None
            if self.batches is not None:
                self.batches.close()
            start = self._kept.step
            data.restore(start, self._kept.place)
        with read_again(self._parts, start, step) as batches:
            return [batch for _, batch in batches][-1]

    def _refuse(self, number: int, value: int, step: int) -> NoReturn:
        data = self._parts.experiment.data
        blocks = [] if hasattr(data, 'restore') else [data.block(step - 1, 1)]
        checks = self._look.checks
        raise UserError(complain('config.task', f'in step {step:,}', checks, number, value, blocks))


def _first_bad(tree: Any) -> str:
    """Returns the paths of the first leaves that are not finite."""
    flags = fetch(jax.jit(each_finite)(tree))
    bad = [path for path, fine in flags.items() if not fine]
    return ', '.join(bad[:3]) + (f' and {len(bad) - 3} more' if len(bad) > 3 else '')
