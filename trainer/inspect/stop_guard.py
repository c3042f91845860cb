# SPDX-License-Identifier: Apache-2.0
"""Ends a run when its step has found a label out of range, or a value that is not finite.

The latter only with `config.guard.non_finite='stop'`. The check itself is in the step
(`trainer.step.health`). Here the host reads its result, when it is available anyway or before a
state is saved, and reports what was found.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.manager import Checkpoints
from trainer.config.errors import UserError
from trainer.config.text import and_more
from trainer.ensemble.step import Ensemble
from trainer.input.prefetch import Prefetcher
from trainer.inspect.explain import explain
from trainer.inspect.replay import Kept, Look, Reader, Replay
from trainer.modules.model_view import param_path
from trainer.observe.table import nbytes
from trainer.parallel.host import fetch
from trainer.run.failure import NonFiniteError
from trainer.step import health as lib
from trainer.step.health import Health
from trainer.step.programs import Programs
from trainer.step.state import TrainState
from trainer.tasks.bad_values import describe_bad_value

_WHAT = {
    lib.LOSS: 'the loss',
    lib.GRADIENT: 'a gradient',
    lib.PARAMETER: 'a parameter',
    lib.SLOT: "the optimizer's state",
}


# On CPUs, copies of states up to this size are kept, to rerun steps.
_MOST_KEPT_BYTES = 2**28

# Time between two looks at states that are neither evaluated nor saved: a look costs as much as a
# few steps of a small model.
_LEAST_SECS = 1.0


class Watch:
    """Reads the health of a run, and ends the run if it has diverged.

    On an accelerator every step checks all values, and a bad step does not change the state. On a
    CPU a step checks only its loss. The rest is checked here, once a second and before a state is
    evaluated or saved; copies of small states are kept, to name the step and the module all the
    same.

    Attributes:
        batches: those that the run reads, or None.
    """

    def __init__(
        self,
        programs: Programs,
        reader: Reader,
        look: Look,
        *,
        stops: bool,
        ensemble: Ensemble | None,
        checkpoints: Checkpoints | None,
        say: Callable[[str], None],
    ):
        """Makes a watch; `begin` starts it.

        Args:
            programs: of the training.
            reader: rereads batches.
            look: finds where in a step a value is not finite.
            stops: whether a non-finite value ends the run; otherwise only labels are checked.
            ensemble: who the members are, or None.
            checkpoints: those of the run, or None.
            say: shows a message to the user.
        """
        self.batches: Prefetcher | None = None
        self._programs = programs
        self._reader = reader
        self._look = look
        self._stops = stops
        self._ensemble = ensemble
        self._checkpoints = checkpoints
        self._replay = Replay(programs, reader, look)
        self._say = say
        self._pending: Health | None = None
        # The newest state known to be finite, and one that is not checked yet.
        self._kept: Kept | None = None
        self._next: Kept | None = None
        self._checked: int | None = None
        self._named: set[int] = set()
        self._taken = -math.inf

    def begin(self, step: int, state: TrainState, place: Any) -> None:
        """Sets the state that the run starts from.

        Args:
            step: number of completed updates.
            state: at this step; finite by definition.
            place: position of a stream, or None.
        """
        self._pending = self._next = self._checked = None
        self._kept = self._keep(step, state, place)
        self._named.clear()

    def note(self, step: int, state: TrainState, place: Any) -> None:
        """Takes a state; `poll` looks at it once its step is done.

        Not if one was taken less than a second ago; several processes take every one, because their
        clocks differ. Arguments as of `begin`.
        """
        several, now = jax.process_count() > 1, time.monotonic()
        if now < self._taken + _LEAST_SECS and not several:
            return
        self._taken = now
        if self._pending is not None and several:
            self._judge(self._pending, state)
            self._kept = self._next
        self._pending = self._programs.sweep(state)
        self._next = self._keep(step, state, place)

    def poll(self, state: TrainState) -> None:
        """Checks the noted state, if its step is done; does not wait.

        Several processes do so at the next event: each would find it ready at another step, and
        what finds the cause needs them all.

        Raises:
            NonFiniteError: if the run has diverged; see `check`.
        """
        if jax.process_count() > 1:
            return
        if self._pending is not None and self._pending.packed.is_ready():  # type: ignore[attr-defined]
            pending, self._pending = self._pending, None
            self._judge(pending, state)
            self._kept = self._next

    def check(self, step: int, state: TrainState) -> None:
        """Waits for the state's step, and checks that it is finite; once for each step.

        Args:
            step: number of completed updates.
            state: at this step.

        Raises:
            NonFiniteError: if a value is not finite, naming the step and where it began; for an
                ensemble, if all members have diverged.
            UserError: if a label is out of its range.
        """
        if step == self._checked:
            return
        health, self._pending = self._pending, None
        if health is None or self._next is None or self._next.step != step:
            health = self._programs.sweep(state)
        self._judge(health, state)
        self._kept, self._checked = self._next or self._kept, step

    def check_labels(self, state: TrainState) -> None:
        """Waits for the state's step, and checks the labels that were found up to it.

        Raises:
            UserError: if one is out of its range.
        """
        assert state.health is not None
        self._judge_labels(np.atleast_2d(fetch(state.health.packed)))

    def _keep(self, step: int, state: TrainState, place: Any) -> Kept:
        """Returns a copy of a state if steps may have to be rerun, otherwise only its place."""
        on_cpu = self._reader.mesh.devices.flat[0].platform == 'cpu'
        if not (on_cpu and self._stops) or nbytes(state) > _MOST_KEPT_BYTES:
            return Kept(step, None, place)
        return self._replay.keep(step, state, place)

    def _judge(self, health: Health, state: TrainState) -> None:
        packed = np.atleast_2d(fetch(health.packed))
        bad_step, kind = packed[:, 0], packed[:, 1]
        bad = np.flatnonzero(bad_step)
        if not len(bad):
            return
        self._judge_labels(packed)
        if self._ensemble is None:
            self._stop(int(kind[0]), int(bad_step[0]), state)
        for member in bad:
            self._name(int(member), int(kind[member]), int(bad_step[member]))
        if len(bad) == len(bad_step):
            raise NonFiniteError('all members of the ensemble have diverged.')

    def _judge_labels(self, packed: np.ndarray) -> None:
        for bad_step, kind, value in zip(*packed[:, :3].T, strict=True):
            if bad_step and kind >= lib.LABELS:
                number = float(value.view(np.float32))
                self._refuse(int(kind) - lib.LABELS, number, int(bad_step))

    def _name(self, member: int, kind: int, step: int) -> None:
        if member in self._named:
            return
        self._named.add(member)
        assert self._ensemble is not None
        self._say(
            f'Warning: member {member} ({self._ensemble.describe(member)}) has diverged: '
            f'{_WHAT[kind]} is not finite in step {step:,}. It keeps its state from before that '
            'step; the other members continue training.'
        )

    def _stop(self, kind: int, bad_step: int, state: TrainState) -> NoReturn:
        self._end_reading()
        saved, late = 'no checkpoint was saved', None
        if (checkpoints := self._checkpoints) is not None:
            try:
                checkpoints.wait()
            except CheckpointError as error:
                late = error
            if (newest := checkpoints.latest()) is not None:
                saved = f'the newest checkpoint is of step {newest:,}'
        try:
            explained = self._explain(kind, bad_step, state)
        except Exception as error:  # Such as out of memory: report the divergence all the same.
            explained = (
                f'{_WHAT[kind].capitalize()} is not finite at step {bad_step:,}; where that began '
                f'was not found ({type(error).__name__}: {str(error).splitlines()[:1]}).'
            )
        found = NonFiniteError(f'the run has diverged; {saved}.\n{explained}')
        if late is not None:
            found.add_note(f'A save in the background failed too: {late}')
        raise found

    def _end_reading(self) -> None:
        """Ends the run's own reading: a loader that both read may mix up their places."""
        if self.batches is not None:
            self.batches.close()

    def _explain(self, kind: int, bad_step: int, state: TrainState) -> str:
        """Returns in which step something was first not finite, and where."""
        assert state.health is not None
        if kind == lib.GRADIENT and state.loss_scale is not None:
            skips, scale = fetch((state.health.skips, state.loss_scale.scale))
            return (
                f'The gradients of step {bad_step:,} are not finite: the loss scale has skipped '
                f'{int(skips)} updates in a row, and is down to {float(scale):g}.\n'
                + self._of_overflow(bad_step, state)
            )
        if self._kept is not None and self._kept.state is not None:
            return self._replay.find(
                self._kept, bad_step, self._is_bad, what=_what_is_bad, ends=True
            )
        on_cpu = not self._programs.sweeps
        bad_param, bad_slot = _bad_leaves(state)
        if kind in (lib.PARAMETER, lib.SLOT):
            when = f'by step {bad_step:,}' if on_cpu else f'in step {bad_step:,}'
            bad = bad_param or bad_slot
            return f'{_WHAT[kind].capitalize()} became non-finite {when}: {bad}.'
        if on_cpu and (bad := bad_param):
            # Of the update before, for the loss that the parameters had until then was finite.
            return (
                f'The loss of step {bad_step:,} is not finite, because a parameter was not when it '
                f'began: {bad}. First non-finite step: {bad_step - 1:,}, in its update.'
            )
        steps = f'Last finite step: {bad_step - 1:,}. First non-finite step: {bad_step:,}.'
        batch = self._batch(bad_step)
        if batch is None:
            return f'{steps}\nThe data is a stream, and its batch cannot be reread.'
        # Parameters are as the bad step has found them, but the number of the step is not.
        before = dataclasses.replace(state, step=jnp.full_like(state.step, bad_step - 1))
        return f'{steps}\n{explain(*fetch(self._look(before, batch)))}'

    def _of_overflow(self, bad_step: int, state: TrainState) -> str:
        """Returns where a step's gradients are not finite although the loss scale is small."""
        hint = 'Look for values above 65,504, which float16 cannot represent.'
        batch = self._batch(bad_step)
        if batch is None:
            return hint
        # The updates were skipped: the parameters are those that the step began with.
        before = dataclasses.replace(state, step=jnp.full_like(state.step, bad_step - 1))
        found, losses, grads, fields = fetch(self._look(before, batch))
        explained = explain(found, losses, grads, fields)
        return f'{explained}\n{hint}' if all(fields.values()) else explained

    def is_sound(self, state: TrainState) -> bool:
        """Waits for a state, and returns whether it is finite; for an ensemble, any member's."""
        health = self._programs.sweep(state)
        return not np.all(fetch(health.is_bad))

    def _is_bad(self, state: TrainState) -> bool:
        return not self.is_sound(state)

    def _batch(self, step: int) -> Any:
        """Rereads the batch of a step; None if that is impossible."""
        start: int | None = step - 1
        if self._reader.data.is_stream:
            start = self._rewound()
        if start is None:
            return None
        with self._reader(start, step, ends=True) as batches:
            # The last one, and not a list: the devices would hold all of them.
            return collections.deque(batches, maxlen=1)[0].arrays

    def _refuse(self, number: int, value: float, step: int) -> NoReturn:
        self._end_reading()
        data = self._reader.data
        blocks = self._streamed(step) if data.is_stream else [data.block(step - 1, 1)]
        checks, when = self._look.checks, f'in step {step:,}'
        numbered = not data.is_stream
        found = describe_bad_value(
            'config.task', when, checks, number, value, blocks, numbered=numbered
        )
        data.close()
        raise UserError(found)

    def _streamed(self, step: int) -> list[Any]:
        """Returns the block of a step of a stream, read again; nothing if that is impossible."""
        start = self._rewound()
        if start is None:
            return []
        blocks = (self._reader.data.block(i, 1) for i in range(start, step))
        return list(collections.deque(blocks, maxlen=1))

    def _rewound(self) -> int | None:
        """Takes a stream back to the last known place, and returns its step; None if unknown."""
        if self._kept is None or (self._kept.place is None and self._kept.step > 0):
            return None
        self._reader.data.restore(self._kept.step, self._kept.place)
        return self._kept.step


def _what_is_bad(state: TrainState) -> str:
    """Returns 'a parameter is not: PATHS' of a state with a value that is not finite, or ''."""
    for kind, paths in zip((lib.PARAMETER, lib.SLOT), _bad_leaves(state), strict=True):
        if paths:
            return f'{_WHAT[kind]} is not: {paths}'
    return ''


def _bad_leaves(state: TrainState) -> tuple[str, str]:
    """Returns the paths of parameters, and of leaves of the optimizer state; see `_first_bad`."""
    assert state.health is not None
    params, known = len(lib.floats(state.params)), state.health.known
    return (
        _first_bad(state.params, known[:params]),
        _first_bad(state.opt_state, known[params:]),
    )


def _first_bad(tree: Any, known: Any) -> str:
    """Returns the paths of the first leaves that are not finite, '' if all are.

    Args:
        tree: parameters, or an optimizer's state.
        known: for each float leaf, the number of elements that do not count.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [param_path(path) for path, x in leaves if lib.floats(x)]
    counts = fetch(jax.jit(lib.count_non_finite)(tree))
    bad = [path for path, n, k in zip(paths, counts, fetch(known), strict=True) if n > k]
    return and_more(bad, 3)
