# SPDX-License-Identifier: Apache-2.0
"""Ends a run if its step has found a label out of range or a non-finite value.

Non-finite values end it only with `config.guard.non_finite='stop'`. The check itself is part of the
train step (`trainer.step.health`). Here the host reads its result, once that is computed or before
a state is saved, and explains it.
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
from trainer.config.errors import UserError, and_more
from trainer.ensemble.step import Ensemble
from trainer.input.prefetch import Prefetcher
from trainer.inspect.explain import explain
from trainer.inspect.replay import Reader, Replay, ReplayStart, StepInspector
from trainer.modules.model_view import param_path
from trainer.observe.table import nbytes
from trainer.parallel.host import fetch, is_ready
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


# On CPUs, states up to this size are copied, to rerun steps from the copy.
_MAX_COPY_BYTES = 2**28

# Minimum time between checks of states that are neither evaluated nor saved: a check costs as much
# as a few steps of a small model.
_MIN_SECS = 1.0


class StopGuard:
    """Reads the health of a run, and ends the run if it has diverged.

    On an accelerator, every step checks all values, and a bad step does not change the state. On a
    CPU, a step checks only its loss; the rest is checked here, at most once a second and before a
    state is evaluated or saved. To name the step and the module nevertheless, small states are
    copied and the steps since then are rerun.

    Attributes:
        batches: the prefetcher of the run, or None.
    """

    def __init__(
        self,
        programs: Programs,
        reader: Reader,
        inspector: StepInspector,
        *,
        stops: bool,
        ensemble: Ensemble | None,
        checkpoints: Checkpoints | None,
        show: Callable[[str], None],
    ):
        """Creates a guard; `begin` starts it.

        Args:
            programs: the training programs.
            reader: rereads batches.
            inspector: finds where in a step a value is not finite.
            stops: whether a non-finite value ends the run; otherwise only labels are checked.
            ensemble: describes the members, or None.
            checkpoints: those of the run, or None.
            show: prints a message to the user.
        """
        self.batches: Prefetcher | None = None
        self._programs = programs
        self._reader = reader
        self._inspector = inspector
        self._stops = stops
        self._ensemble = ensemble
        self._checkpoints = checkpoints
        self._replay = Replay(programs, reader, inspector)
        self._show = show
        self._pending: Health | None = None
        # The newest state known to be finite, and the one whose check is pending.
        self._last_finite: ReplayStart | None = None
        self._candidate: ReplayStart | None = None
        self._checked_step: int | None = None
        self._reported_members: set[int] = set()
        self._last_check_time = -math.inf

    def begin(self, step: int, state: TrainState, position: Any) -> None:
        """Sets the state that the run starts from.

        Args:
            step: number of completed updates.
            state: train state after this step; assumed to be finite.
            position: position of a stream, or None.
        """
        # Left over from an earlier call of `fit`.
        self._pending = self._candidate = self._checked_step = None
        self._last_finite = self._copy_or_position(step, state, position)
        self._reported_members.clear()

    def start_check(self, step: int, state: TrainState, position: Any) -> None:
        """Starts the check of a state, whose result `poll` reads once it is computed.

        Does nothing within a second of the last one. Several processes check every state, because
        their clocks differ. The arguments are those of `begin`.
        """
        several, now = jax.process_count() > 1, time.monotonic()
        if now < self._last_check_time + _MIN_SECS and not several:
            return
        self._last_check_time = now
        # `poll` does not read it with several processes: see there.
        if self._pending is not None and several:
            self._check_health(self._pending, state)
            # Only now: until its check is read, the candidate may already be bad.
            self._last_finite = self._candidate
        self._pending = self._programs.sweep(state)
        self._candidate = self._copy_or_position(step, state, position)

    def poll(self, state: TrainState) -> None:
        """Reads the result of a pending check if it is computed; does not wait.

        With several processes, this happens at the next event instead: each would find the result
        ready at another step, but finding the cause is collective.

        Raises:
            NonFiniteError: if the run has diverged; see `check`.
        """
        if jax.process_count() > 1:
            return
        if self._pending is not None and is_ready(self._pending.packed):
            pending, self._pending = self._pending, None
            self._check_health(pending, state)
            self._last_finite = self._candidate

    def check(self, step: int, state: TrainState) -> None:
        """Waits for the state's step, and checks that it is finite; once for each step.

        Args:
            step: number of completed updates.
            state: train state after this step.

        Raises:
            NonFiniteError: if a value is not finite, naming the step and where it began; for an
                ensemble, if all members have diverged.
            UserError: if a label is out of its range.
        """
        if step == self._checked_step:
            return
        health, self._pending = self._pending, None
        # The pending check may be of an older state, which says nothing about this one.
        if health is None or self._candidate is None or self._candidate.step != step:
            health = self._programs.sweep(state)
        self._check_health(health, state)
        self._last_finite, self._checked_step = self._candidate or self._last_finite, step

    def check_labels(self, state: TrainState) -> None:
        """Waits for the state's step, and raises if any step so far has found a bad label.

        Raises:
            UserError: if a label is out of its range.
        """
        assert state.health is not None
        self._check_labels(np.atleast_2d(fetch(state.health.packed)))

    def _copy_or_position(self, step: int, state: TrainState, position: Any) -> ReplayStart:
        """Returns a copy of a state if steps may have to be rerun, otherwise only the position."""
        on_cpu = self._reader.mesh.devices.flat[0].platform == 'cpu'
        if not (on_cpu and self._stops) or nbytes(state) > _MAX_COPY_BYTES:
            return ReplayStart(step, None, position)
        return self._replay.keep(step, state, position)

    def _check_health(self, health: Health, state: TrainState) -> None:
        """Waits for the result of a check, and raises if it is bad."""
        packed = np.atleast_2d(fetch(health.packed))
        bad_step, kind = packed[:, 0], packed[:, 1]
        bad = np.flatnonzero(bad_step)
        if not len(bad):
            return
        # Labels first: one that is out of range makes the loss non-finite, and is the better
        # explanation.
        self._check_labels(packed)
        if self._ensemble is None:
            self._stop(int(kind[0]), int(bad_step[0]), state)
        for member in bad:
            self._report_member(int(member), int(kind[member]), int(bad_step[member]))
        # As long as one member is left, the ensemble continues.
        if len(bad) == len(bad_step):
            raise NonFiniteError('all members of the ensemble have diverged.')

    def _check_labels(self, packed: np.ndarray) -> None:
        for bad_step, kind, value in zip(*packed[:, :3].T, strict=True):
            if bad_step and kind >= lib.LABELS:
                # The label is in the bits of an integer: all of `packed` is int32.
                number = float(value.view(np.float32))
                self._raise_label_error(int(kind) - lib.LABELS, number, int(bad_step))

    def _report_member(self, member: int, kind: int, step: int) -> None:
        """Warns, once, of a member that has diverged."""
        if member in self._reported_members:
            return
        self._reported_members.add(member)
        assert self._ensemble is not None
        self._show(
            f'Warning: member {member} ({self._ensemble.describe(member)}) has diverged: '
            f'{_WHAT[kind]} is not finite in step {step:,}. It keeps its state from before that '
            'step; the other members continue training.'
        )

    def _stop(self, kind: int, bad_step: int, state: TrainState) -> NoReturn:
        self._stop_reading()
        saved, save_error = 'no checkpoint was saved', None
        if (checkpoints := self._checkpoints) is not None:
            try:
                # A save may be in progress; the message should name the newest checkpoint that is
                # complete.
                checkpoints.wait()
            except CheckpointError as error:
                save_error = error
            if (newest := checkpoints.latest()) is not None:
                saved = f'the newest checkpoint is of step {newest:,}'
        try:
            explained = self._explain(kind, bad_step, state)
        except Exception as error:  # Such as out of memory: still report the divergence.
            explained = (
                f'{_WHAT[kind].capitalize()} is not finite at step {bad_step:,}; finding the cause '
                f'failed ({type(error).__name__}: {str(error).splitlines()[:1]}).'
            )
        diverged = NonFiniteError(f'the run has diverged; {saved}.\n{explained}')
        if save_error is not None:
            diverged.add_note(f'A background save failed too: {save_error}')
        raise diverged

    def _stop_reading(self) -> None:
        """Stops the run's prefetcher: a loader need not support two readers at a time."""
        if self.batches is not None:
            self.batches.close()

    def _explain(self, kind: int, bad_step: int, state: TrainState) -> str:
        """Returns a message on the step and the place of the first non-finite value."""
        assert state.health is not None
        # With a loss scale single infinite gradients are expected, and skipped; this is reached
        # after many in a row.
        if kind == lib.GRADIENT and state.loss_scale is not None:
            skips, scale = fetch((state.health.skips, state.loss_scale.scale))
            return (
                f'The gradients of step {bad_step:,} are not finite: the loss scale has skipped '
                f'{int(skips)} updates in a row, and is down to {float(scale):g}.\n'
                + self._explain_overflow(bad_step, state)
            )
        if self._last_finite is not None and self._last_finite.state is not None:
            return self._replay.find(
                self._last_finite, bad_step, self._is_bad, what=_describe_bad_state, ends=True
            )
        on_cpu = not self._programs.sweeps
        # No copy to rerun from. On accelerators the state is still that of before the bad step; on
        # CPUs it has gone on, and only the paths are known.
        bad_param, bad_slot = _bad_leaves(state)
        if kind in (lib.PARAMETER, lib.SLOT):
            when = f'by step {bad_step:,}' if on_cpu else f'in step {bad_step:,}'
            bad = bad_param or bad_slot
            return f'{_WHAT[kind].capitalize()} became non-finite {when}: {bad}.'
        if on_cpu and (bad := bad_param):
            # The step before must have written it, because its own loss was still finite.
            return (
                f'The loss of step {bad_step:,} is not finite, because a parameter already was '
                f'not: {bad}. First non-finite step: {bad_step - 1:,}, in its update.'
            )
        steps = f'Last finite step: {bad_step - 1:,}. First non-finite step: {bad_step:,}.'
        batch = self._reread_batch(bad_step)
        if batch is None:
            return f'{steps}\nThe data is a stream, and its batch cannot be reread.'
        # The bad step did not change the parameters, but it increased the step number.
        before = dataclasses.replace(state, step=jnp.full_like(state.step, bad_step - 1))
        return f'{steps}\n{explain(*fetch(self._inspector(before, batch)))}'

    def _explain_overflow(self, bad_step: int, state: TrainState) -> str:
        """Returns a message on where a step's gradients overflow in spite of the loss scale."""
        hint = 'Look for values above 65,504, which float16 cannot represent.'
        batch = self._reread_batch(bad_step)
        if batch is None:
            return hint
        # The updates were skipped, so the parameters are those before the step.
        before = dataclasses.replace(state, step=jnp.full_like(state.step, bad_step - 1))
        records, losses, grads, fields = fetch(self._inspector(before, batch))
        explained = explain(records, losses, grads, fields)
        return f'{explained}\n{hint}' if all(fields.values()) else explained

    def is_finite(self, state: TrainState) -> bool:
        """Waits for a state, and returns whether it is finite; for an ensemble, any member's."""
        health = self._programs.sweep(state)
        return not np.all(fetch(health.is_bad))

    def _is_bad(self, state: TrainState) -> bool:
        return not self.is_finite(state)

    def _reread_batch(self, step: int) -> Any:
        """Returns the batch of a step, read again; None if that is impossible."""
        start: int | None = step - 1
        # A stream is read from a known position up to the step; other data goes there directly.
        if self._reader.data.is_stream:
            start = self._rewind_stream()
        if start is None:
            return None
        with self._reader(start, step, ends=True) as batches:
            # Not a list: all of the batches would stay in the memory of the devices.
            return collections.deque(batches, maxlen=1)[0].arrays

    def _raise_label_error(self, number: int, value: float, step: int) -> NoReturn:
        """Raises the UserError on a label out of range.

        Args:
            number: index of the task's check that failed.
            value: the label that is out of range.
            step: the step whose batch has it.
        """
        self._stop_reading()
        data = self._reader.data
        blocks = self._reread_stream_block(step) if data.is_stream else [data.block(step - 1, 1)]
        checks, when = self._inspector.find_checks(), f'in step {step:,}'
        numbered = not data.is_stream
        message = describe_bad_value(
            'config.task', when, checks, number, value, blocks, numbered=numbered
        )
        # The run is over, and `block` may have started worker processes.
        data.close()
        raise UserError(message)

    def _reread_stream_block(self, step: int) -> list[Any]:
        """Returns a list of a step's block of a stream, read again; empty if impossible."""
        start = self._rewind_stream()
        if start is None:
            return []
        blocks = (self._reader.data.block(i, 1) for i in range(start, step))
        return list(collections.deque(blocks, maxlen=1))

    def _rewind_stream(self) -> int | None:
        """Rewinds a stream to the last known position, and returns its step; None if unknown."""
        last = self._last_finite
        if last is None or (last.position is None and last.step > 0):
            return None
        self._reader.data.restore(last.step, last.position)
        return last.step


def _describe_bad_state(state: TrainState) -> str:
    """Returns 'a parameter is not: PATHS' if a value of the state is not finite, otherwise ''."""
    for kind, paths in zip((lib.PARAMETER, lib.SLOT), _bad_leaves(state), strict=True):
        if paths:
            return f'{_WHAT[kind]} is not: {paths}'
    return ''


def _bad_leaves(state: TrainState) -> tuple[str, str]:
    """Returns the non-finite parameters and the non-finite leaves of the optimizer state."""
    assert state.health is not None
    # `known` has the leaves of both trees in one array, parameters first.
    params, known = len(lib.floats(state.params)), state.health.known
    return (
        _first_bad(state.params, known[:params]),
        _first_bad(state.opt_state, known[params:]),
    )


def _first_bad(tree: Any, known: Any) -> str:
    """Returns the paths of the first leaves that are not finite, '' if all are.

    Args:
        tree: parameters, or an optimizer's state.
        known: for each float leaf, the number of non-finite elements to ignore: they were there
            from the start.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [param_path(path) for path, x in leaves if lib.floats(x)]
    counts = fetch(jax.jit(lib.count_non_finite)(tree))
    bad = [path for path, n, k in zip(paths, counts, fetch(known), strict=True) if n > k]
    return and_more(bad, 3)
