# SPDX-License-Identifier: Apache-2.0
"""Opens Orbax's manager for a run that writes, and the directory below it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from trainer import compat

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


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


def _remove_uncommitted(directory: epath.Path) -> None:
    # Orbax's own cleaning removes every directory without a commit file, a user's too.
    for _, path in step_directories(directory):
        if path.is_dir() and not is_committed(path):
            # Threads of a save that has just failed may still write; then it stays for the next.
            with contextlib.suppress(OSError):
                path.rmtree()
