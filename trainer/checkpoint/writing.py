# SPDX-License-Identifier: Apache-2.0
"""Opens Orbax's checkpoint manager for saves, and cleans up its directory first."""

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
    """Whether the save of a step is complete."""
    return compat.is_orbax_committed(step_directory)


def is_on_host(state: Any) -> bool:
    """Whether a state is in the host memory of a single process.

    Then a background thread may call Orbax; otherwise only the main thread may. With several
    processes a save synchronizes them, so each has to call it in the same order as its collectives.
    """
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    on_cpu = all(device.platform == 'cpu' for leaf in arrays for device in leaf.devices())
    keys = any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in arrays)
    return on_cpu and not keys and jax.process_count() == 1


def check_writable(directory: epath.Path) -> None:
    """Creates and deletes a file, to raise errors at once that Orbax raises after ten minutes."""
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f'.writable.{jax.process_index()}'
    probe.write_text('')
    probe.unlink()


def open_manager(directory: epath.Path, policy: Any) -> ocp.CheckpointManager:
    """Returns Orbax's manager of a directory, after removing incomplete saves.

    Args:
        directory: where the checkpoints are, one directory for each step.
        policy: Orbax preservation policy.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import options as ocp_options

    from trainer.checkpoint.meta import MetaHandler

    # Before Orbax lists the directory.
    if jax.process_index() == 0:
        _remove_uncommitted(directory)
        _set_aside_damaged_metadata(directory)

    class Manager(ocp.CheckpointManager):
        """A manager without preemption handling, which the run does itself."""

        def reached_preemption(self, step: int) -> bool:
            return False

    return Manager(
        directory,
        item_names=('state', 'meta'),
        item_handlers={'state': ocp.PyTreeCheckpointHandler(), 'meta': MetaHandler()},
        options=ocp.CheckpointManagerOptions(
            create=True,
            preservation_policy=policy,
            # If Orbax committed by a rename, an empty or half-copied directory would count as a
            # checkpoint.
            atomicity_options=ocp_options.AtomicityOptions(
                mode=ocp_options.AtomicityMode.COMMIT_FILE
            ),
            async_options=compat.async_options(),
        ),
    )


def _set_aside_damaged_metadata(directory: epath.Path) -> None:
    # Orbax does not need its own metadata to restore a step, but a damaged file makes the next save
    # fail, so that each resume would lose its steps again.
    for _, path in step_directories(directory):
        file = compat.orbax_step_metadata(path)
        if file.is_file() and (problem := _find_metadata_problem(file.read_bytes())):
            aside = file.parent / f'{file.name}.damaged'
            file.replace(aside)
            _log.warning('%s is damaged (%s): moved to %s', file, problem, aside)


def _find_metadata_problem(data: bytes) -> str | None:
    try:
        metadata = json_text.parse(data)
    except ValueError as error:
        return str(error)
    if not isinstance(metadata, dict):
        return f'it is {json_text.type_name(metadata)}, not an object'
    objects, times = compat.orbax_step_metadata_fields()
    for name in objects:
        if not isinstance(metadata.get(name, {}), dict):
            return f'{name!r} is {json_text.type_name(metadata[name])}, not an object'
    for name in times:
        if metadata.get(name) is not None and not json_text.is_int(metadata[name]):
            return f'{name!r} is not a time'
    return None


def _remove_uncommitted(directory: epath.Path) -> None:
    # Orbax's own cleanup would remove every directory without a commit file, even a user's.
    for _, path in step_directories(directory):
        if path.is_dir() and not is_committed(path):
            # Threads of a save that has just failed may still write there: the next run removes it.
            with contextlib.suppress(OSError):
                path.rmtree()
