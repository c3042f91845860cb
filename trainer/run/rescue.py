# SPDX-License-Identifier: Apache-2.0
"""Ends a run after an error: saves the last completed step, records the error, calls the hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax

from trainer.parallel import last_words, processes
from trainer.parallel.signals import StopRequest
from trainer.run.hook_calls import Hooks
from trainer.run.resume import Recovery
from trainer.step import donated
from trainer.step.state import TrainState

# How long a process that fails waits for the others to fail at the same step.
_FAILURE_WAIT_SECS = 10


@contextlib.contextmanager
def handle_errors(
    recovery: Recovery, hooks: Hooks, save: Callable[[BaseException], None]
) -> Iterator[None]:
    """Saves and records a run that an error ends inside the context, and raises the error.

    Args:
        recovery: closes the run's files.
        hooks: are called at the end.
        save: saves what can be saved, given the error.
    """
    # A process that fails because another one did exits a moment later by `os._exit`, and its end
    # should still be recorded.
    several = jax.process_count() > 1
    try:
        with last_words.register(recovery.record_exit, stay=several):
            yield
    except BaseException as error:
        hooks.add_note_to(error)
        donated.explain(error)
        # Save first, then record the failure, then call the hooks: each must run although the one
        # before it fails, and the error record names the step that was saved.
        try:
            save(error)
        finally:
            try:
                recovery.abandon(error)
            finally:
                hooks.end_failed(error)
        raise


def save_completed(
    recovery: Recovery,
    step: int,
    state: TrainState,
    error: BaseException,
    stop: StopRequest,
    *,
    call: int,
    is_finite: Callable[[TrainState], bool],
) -> None:
    """Saves the last completed step before an error ends the run.

    Args:
        recovery: saves the state.
        step: number of completed updates.
        state: train state after this step.
        error: what ends the run.
        stop: the request to stop, if there was one.
        call: number of the call of `fit`.
        is_finite: returns whether a state is finite.
    """
    if not _wait_until_all_failed(stop, step, call):
        return
    if isinstance(error, KeyboardInterrupt) and stop.status == 'interrupted':
        recovery.remember(step, state)  # A second Ctrl-C means: do not save.
    else:
        recovery.rescue(step, state, error, is_finite=is_finite)


def _wait_until_all_failed(stop: StopRequest, step: int, call: int) -> bool:
    """Waits for the other processes, and returns whether all have failed at this step.

    A save needs all of them.
    """
    if jax.process_count() > 1:
        # Both numbers: a process that waits at another step, or in another call, has not failed at
        # the same place.
        barrier = f'failed at step {step} in call {call}'
        stop.all_failed = processes.wait_for_all(barrier, _FAILURE_WAIT_SECS)
        return stop.all_failed
    return True
