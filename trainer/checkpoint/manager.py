# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of one run: asynchronous saves with Orbax, retention, and verified restores.

A save copies the state on the devices, and writes the copy in the background. Orbax writes the
arrays and the metadata with their digest into one directory, and a commit file last, so a killed
save is never taken for a checkpoint. A restore compares the digest.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import jax
from etils import epath

from trainer.checkpoint import checked, digest, empty, reading, writing
from trainer.checkpoint.errors import (
    CheckpointError,
    DamageError,
    SaveError,
    first_line,
    is_damage,
    is_temporary,
)
from trainer.checkpoint.retention import Policy, Retention
from trainer.config import files, json_text
from trainer.config.errors import UserError
from trainer.parallel import processes
from trainer.parallel.host import fetch

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_log = logging.getLogger('trainer')
_Read = TypeVar('_Read')


def preload() -> None:
    """Imports Orbax in the background, while the main thread waits for the compiler."""

    def import_orbax() -> None:
        import orbax.checkpoint  # noqa: F401

    # Not a daemon: if the process exits in the middle of this import, it aborts.
    threading.Thread(target=import_orbax, name='import-orbax').start()


class _Save(NamedTuple):
    """A save in progress, in its own thread."""

    step: int
    future: concurrent.futures.Future[None]
    writer: concurrent.futures.ThreadPoolExecutor


class Checkpoints:
    """The checkpoints below one directory, named by the number of completed updates.

    Reading does not change files, so a process that only reads may run beside one that trains. The
    first save opens Orbax's manager and removes the incomplete saves of a killed process.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        retention: Retention,
        on_commit: Callable[[], None] = lambda: None,
    ):
        """Sets the directory; the first save creates it.

        Args:
            directory: where the checkpoints are, one directory for each step.
            retention: which checkpoints to keep.
            on_commit: called in the background, by the main process, when a save is committed.
        """
        self.directory = epath.Path(directory).absolute()
        self._on_commit = on_commit
        self._retention = retention
        self._lazy_manager: ocp.CheckpointManager | None = None
        self._in_flight: _Save | None = None
        self._scores: dict[int, float] = {}
        # Compiled once: the copy (the next step donates the original), and the sums of the digest.
        self._copy = jax.jit(lambda state: jax.tree.map(lambda x: x.copy(), state))
        self._sums = jax.jit(digest.leaf_sums)

    # ---- listing -------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first."""
        # Not from Orbax's manager, which only a save opens: a process that reads changes no files.
        directories = writing.step_directories(self.directory)
        return [step for step, path in directories if writing.is_committed(path)]

    def latest(self) -> int | None:
        """Returns the newest committed step, or None."""
        return max(self.steps(), default=None)

    def newest_sound(self) -> int | None:
        """Returns the newest step whose metadata can be read and is of this step, or None.

        Its arrays may be damaged all the same: only `restore` reads them.
        """
        for step in reversed(self.steps()):
            with contextlib.suppress(CheckpointError):
                self.check_name(step, self.meta(step))
                return step
        return None

    def has(self, step: int) -> bool:
        """Whether a step is committed, or its save is in flight."""
        in_flight = self._in_flight is not None and self._in_flight.step == step
        return in_flight or step in self.steps()

    def best(self) -> int | None:
        """Returns the step with the best metric, or None if no checkpoint has one."""
        return self._retention.best(self.steps(), self._score)

    def meta(self, step: int, needed: Sequence[str] = ()) -> dict[str, Any]:
        """Returns the metadata of a step, including `digest`.

        Args:
            step: number of the step that was saved.
            needed: keys that it must have, such as `checked.RUN_KEYS`.

        Raises:
            CheckpointError: if it cannot be read, or does not have the expected form.
        """
        try:
            meta = json_text.parse(self._meta_file(step).read_bytes())
        except (OSError, ValueError) as error:
            raise self._read_error(step, error) from error
        if problem := checked.find_problem(meta, needed):
            raise self._damage_error(step, problem)
        return cast(dict[str, Any], meta)

    # ---- reading -------------------------------------------------------------------------------

    def restore(self, step: int, abstract: Any, *, free: str = '') -> Any:
        """Returns the state of a step, with the shardings of the abstract one.

        Args:
            step: number of the step that was saved.
            abstract: shape, dtype and sharding of each leaf.
            free: a field of the state whose leaves may differ: see `reading.read_state`.

        Raises:
            UserError: if there is no such checkpoint, or its leaves differ from `abstract`.
            CheckpointError: if the arrays differ from those that were saved.
        """
        steps = self.steps()
        if step not in steps:
            have = ', '.join(map(str, steps)) or 'none'
            raise UserError(f'no checkpoint of step {step} in {self.directory}; available: {have}')
        meta, state = _read_together(lambda: self._read(step, _saved_part(abstract), free))
        # Of the arrays on the devices, so it covers the whole way from the files.
        actual, stored = self.digest(state), meta.get('digest')
        if actual != stored:
            raise self._damage_error(step, f'its digest is {actual}, but {stored} was saved')
        self.check_name(step, meta, state)
        return state

    def _read(self, step: int, abstract: Any, free: str) -> tuple[dict[str, Any], Any]:
        """Returns the metadata and the arrays of a step, which are not verified yet."""
        meta, directory = self.meta(step), self.directory / str(step) / 'state'
        try:
            return meta, reading.read_state(directory, abstract, empty.from_metadata(meta), free)
        except reading.StateMismatch as error:
            advice = 'Use the config of that checkpoint, or set another --workdir.'
            if error.only_half_precision_slots:
                advice = (
                    'The optimizer state of half-precision parameters is now kept in float32. To '
                    'convert it, start a new run from this one: a new --workdir, and '
                    f'config.init_from=dict(path={str(self.directory.parent)!r}, step={step}, '
                    'optimizer=True)'
                )
            raise UserError(
                f'{self.directory / str(step)} does not fit the state of this config:\n'
                f'{error}\n{advice}'
            ) from error
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # Out of memory: the checkpoint is not damaged.
        except Exception as error:
            raise self._read_error(step, error) from error

    def check_name(self, step: int, meta: Mapping[str, Any], state: Any = None) -> None:
        """Checks that a checkpoint belongs to the step that its directory is named after.

        Args:
            step: the step in the name of the directory.
            meta: the metadata.
            state: the state, if it has been read.

        Raises:
            DamageError: if it was copied, renamed or linked; the message names all steps.
        """
        recorded = {'its metadata': meta.get('step', step)}
        if hasattr(state, 'step'):
            recorded['its state'] = int(fetch(state.step))
        if set(recorded.values()) != {step}:
            steps = ' and '.join(f'{what} says {number}' for what, number in recorded.items())
            raise DamageError(
                f'{self.directory / str(step)} is not the checkpoint of step {step}: {steps}. It '
                'was copied, renamed or linked'
            )

    def digest(self, state: Any) -> str:
        """Returns the digest of a state."""
        return self._start_digest(_saved_part(state))()

    # ---- writing -------------------------------------------------------------------------------

    def set_aside(self, step: int) -> epath.Path:
        """Renames the directory of a damaged checkpoint; returns its new path.

        All processes must call it; the main process renames.
        """
        path = self.directory / str(step)
        aside, count = self.directory / f'{step}.damaged', 1
        while aside.exists():  # The run has saved this step again, and it was damaged again.
            count += 1
            aside = self.directory / f'{step}.damaged-{count}'
        processes.sum_over_processes(0)  # All have found the name.
        if jax.process_index() == 0:
            path.rename(aside)
        processes.sum_over_processes(0)  # No process lists it any more.
        self._scores.pop(step, None)
        return aside

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts a save in the background and returns as soon as the state may be donated.

        If the previous save is in progress, it waits for that first, so that at most one copy of
        the state is alive.

        Args:
            step: number of completed updates, and name of the directory.
            state: the state; it is copied on the devices.
            meta: JSON values saved beside the arrays; 'metrics' and 'evaluated' decide which
                step is the best.

        Raises:
            SaveError: if the previous save failed with a permanent error, as in `check`.
        """
        self._report_finished()
        # Before Orbax runs: its policy asks for the score before the metadata is on disk.
        self._scores[step] = self._retention.score(meta)
        # Training waits only for this copy: the next step donates the state.
        snapshot = self._copy(_saved_part(state))
        # One thread per save, so that an idle trainer has no threads.
        writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        if writing.is_on_host(snapshot):
            future = writer.submit(self._write, step, snapshot, dict(meta))
        else:
            try:
                # In this thread (see `is_on_host`); only the wait for the commit is in another one.
                self._start(step, snapshot, dict(meta))
            except Exception as error:
                raise self._save_error(step, error) from error
            future = writer.submit(self._finish)
        writer.shutdown(wait=False)
        self._in_flight = _Save(step, future, writer)

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Updates metadata of a committed step; its arrays and digest do not change."""
        meta = {**self.meta(step), **values}
        self._scores[step] = self._retention.score(meta)
        if jax.process_index() == 0:  # Atomically: a reader may be reading it.
            files.replace(self._meta_file(step), json.dumps(meta))

    def check(self) -> None:
        """Checks, without waiting, whether the save in progress has failed.

        Raises:
            SaveError: if it failed with a permanent error, such as a full disk. A temporary error
                is a warning: the next save tries again.
        """
        if self._in_flight is not None and self._in_flight.future.done():
            self._report_finished()

    def wait(self) -> None:
        """Waits until every save is committed.

        Raises:
            SaveError: if one has failed.
        """
        if self._in_flight is None:
            return
        save = self._in_flight
        # Cleared only afterwards: if Ctrl-C interrupts the wait, the save is still in progress.
        save.writer.shutdown()
        self._in_flight = None
        error = save.future.exception()
        if error is not None:
            raise self._save_error(save.step, error) from error

    def close(self) -> None:
        """Waits for the save in progress and ends all threads; a later save starts them again.

        Raises:
            SaveError: if that save has failed.
        """
        self.wait()
        if self._lazy_manager is not None:
            self._lazy_manager.close()
            self._lazy_manager = None

    def _report_finished(self) -> None:
        """Waits like `wait`, but only warns of a temporary failure."""
        try:
            self.wait()
        except SaveError as error:
            if not error.is_temporary:
                raise
            _log.warning('%s\nTraining continues, and the next save tries again.', error)

    def _write(self, step: int, snapshot: Any, meta: dict[str, Any]) -> None:
        self._start(step, snapshot, meta)
        self._finish()

    def _finish(self) -> None:
        self._manager.wait_until_finished()  # Raises the errors of Orbax's threads.
        if jax.process_index() == 0:
            self._on_commit()

    def _start(self, step: int, snapshot: Any, meta: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        from trainer.checkpoint.meta import MetaSave

        writing.check_writable(self.directory)
        # `force`: otherwise Orbax skips a step that is not above its newest one, without an error.
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(empty.remove(snapshot)),
                meta=MetaSave(
                    meta={**meta, **empty.to_metadata(snapshot)},
                    digest=self._start_digest(snapshot),
                ),
            ),
            force=True,
        )

    def _start_digest(self, state: Any) -> Callable[[], str]:
        """Starts the sums of the digest on the devices; returns a function that finishes it."""
        if writing.is_on_host(state):
            return lambda: digest.combine(state, digest.host_sums(state))
        sums = self._sums(state)
        return lambda: digest.combine(state, fetch(sums))

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._lazy_manager is None:
            policy = Policy(self._retention, self._score)
            self._lazy_manager = writing.open_manager(self.directory, policy)
        return self._lazy_manager

    def _score(self, step: int) -> float:
        """Returns the retention score of a step; an unreadable one is never the best."""
        if step not in self._scores:
            try:
                self._scores[step] = self._retention.score(self.meta(step))
            except CheckpointError:
                return -math.inf
        return self._scores[step]

    def _meta_file(self, step: int) -> epath.Path:
        return self.directory / str(step) / 'meta' / 'metadata'

    def _read_error(self, step: int, error: Exception) -> CheckpointError:
        if is_damage(error):
            return self._damage_error(step, first_line(error))
        return CheckpointError(f'{self.directory / str(step)} cannot be read: {first_line(error)}')

    def _damage_error(self, step: int, cause: str) -> CheckpointError:
        path = self.directory / str(step)
        if not writing.is_committed(path):
            return CheckpointError(f'{path} does not exist, or was deleted while it was being read')
        return DamageError(f'{path} is damaged: {cause.rstrip(".")}')

    def _save_error(self, step: int, error: BaseException) -> SaveError:
        manager, self._lazy_manager = self._lazy_manager, None
        if manager is not None:
            # After a failure Orbax's list of steps is wrong, so the next save opens a new manager.
            # The old one raises the error again in this thread, and can be closed only after that.
            with contextlib.suppress(Exception):
                manager.wait_until_finished()
            with contextlib.suppress(Exception):
                manager.close()
        newest = self.latest()
        start = 'the beginning: there is no checkpoint' if newest is None else f'step {newest}'
        return SaveError(
            f'the save of step {step} in {self.directory} failed ({first_line(error)}).\n'
            f'Fix the cause; running the same command again resumes from {start}.',
            is_temporary=is_temporary(error),
        )


def _read_together(read: Callable[[], _Read]) -> _Read:
    """Returns what this process reads; raises in all processes if one of them cannot read.

    Each reads its own part, and what follows is a collective: one alone must not leave.
    """
    try:
        result, error = read(), None
    except CheckpointError as raised:
        result, error = None, raised
    errors = processes.gather(error and [isinstance(error, DamageError), str(error)])
    if error is not None:
        raise error
    for is_damaged, text in filter(None, errors):
        raise (DamageError if is_damaged else CheckpointError)(text)
    return cast(_Read, result)


def _saved_part(state: Any) -> Any:
    """Returns the part of a training state that is saved; other states are saved as a whole."""
    return getattr(state, 'durable', state)
