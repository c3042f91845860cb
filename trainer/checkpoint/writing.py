# SPDX-License-Identifier: Apache-2.0
"""Opens Orbax's manager for a run that writes, and the directory below it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from trainer import compat
from trainer.config import json_text

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_log = logging.getLogger('trainer')


def step_directories(directory: epath.Path) -> Iterator[tuple[int, epath.Path]]:
    """Yields the steps below a directory, oldest first, committed or not; skips all other names."""
    if directory.is_dir():
        names = {p.name for p in directory.iterdir() if p.name.isascii() and p.name.isdigit()}
        for step in sorted(int(name) for name in names if name == str(int(name))):
            yield step, directory / str(step)


def is_committed(step_directory: epath.Path) -> bool:
    """Whether the save of a step has ended."""
    return compat.is_orbax_committed(step_directory)


def on_host(state: Any) -> bool:
    """Whether a state lies in the memory of this one process.

    Then Orbax may run in a thread of ours; several processes must call it from their main threads.
    """
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    on_cpu = all(device.platform == 'cpu' for leaf in arrays for device in leaf.devices())
    keys = any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in arrays)
    return on_cpu and not keys and jax.process_count() == 1


def check_writable(directory: epath.Path) -> None:
    """Raises what the file system says to a new file; Orbax would wait ten minutes to say it."""
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f'.writable.{jax.process_index()}'
    probe.write_text('')
    probe.unlink()


def open_manager(directory: epath.Path, policy: Any) -> ocp.CheckpointManager:
    """Returns Orbax's manager of a directory, after removing saves that were cut short there.

    Args:
        directory: where the steps are.
        policy: Orbax preservation policy.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import options as ocp_options

    from trainer.checkpoint.meta import MetaHandler

    if jax.process_index() == 0:
        _remove_uncommitted(directory)
        _set_damaged_notes_aside(directory)

    class Manager(ocp.CheckpointManager):
        """Preemption is the run's own affair; Orbax's thread would ask about steps of the past."""

        def reached_preemption(self, step: int) -> bool:
            return False

    return Manager(
        directory,
        item_names=('state', 'meta'),
        item_handlers={'state': ocp.PyTreeCheckpointHandler(), 'meta': MetaHandler()},
        options=ocp.CheckpointManagerOptions(
            create=True,
            preservation_policy=policy,
            # A half-copied or empty step directory counts as a checkpoint under a mere rename.
            atomicity_options=ocp_options.AtomicityOptions(
                mode=ocp_options.AtomicityMode.COMMIT_FILE
            ),
            async_options=compat.synchronous_directories(),
        ),
    )


def _set_damaged_notes_aside(directory: epath.Path) -> None:
    # Orbax does without them, but of another shape they would fail the next save, and not the
    # restore, and so each resume would lose its steps again.
    for _, path in step_directories(directory):
        notes = compat.orbax_notes(path)
        if notes.is_file() and (problem := _problem_of_notes(notes.read_bytes())):
            aside = notes.parent / f'{notes.name}.damaged'
            notes.replace(aside)
            _log.warning('%s is damaged (%s): moved to %s', notes, problem, aside)


def _problem_of_notes(data: bytes) -> str | None:
    try:
        found = json_text.parse(data)
    except ValueError as error:
        return str(error)
    if not isinstance(found, dict):
        return f'it is {json_text.name(found)}, not an object'
    objects, times = compat.orbax_notes_fields()
    for name in objects:
        if not isinstance(found.get(name, {}), dict):
            return f'{name!r} is {json_text.name(found[name])}, not an object'
    for name in times:
        if found.get(name) is not None and not json_text.is_int(found[name]):
            return f'{name!r} is no time'
    return None


def _remove_uncommitted(directory: epath.Path) -> None:
    # Orbax's own cleaning removes every directory without a commit file, a user's too.
    for _, path in step_directories(directory):
        if path.is_dir() and not is_committed(path):
            # Threads of a save that has just failed may still write; then it stays for the next.
            with contextlib.suppress(OSError):
                path.rmtree()
