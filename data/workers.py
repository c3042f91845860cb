# SPDX-License-Identifier: Apache-2.0
"""Grain's worker processes: how they start, what they say when they fail, and that they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from typing import Any

from .compat import mark_grain_flags_parsed


class WorkerError(RuntimeError):
    """A worker process failed, or died; the message has its own error and traceback."""


def prefetched(dataset: Any, workers: int, buffer: int) -> Any:
    """Returns a Grain dataset whose elements are made by so many worker processes.

    Args:
        dataset: a `grain.IterDataset`.
        workers: number of processes; 0 leaves the work to this one.
        buffer: elements that each worker keeps ready.
    """
    import grain.python as grain

    mark_grain_flags_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer)
    return dataset.mp_prefetch(options, worker_init_fn=_start)


def _start(index: int, count: int) -> None:
    """Runs first in a worker."""
    # A signal to the whole group asks the trainer to save and end; it still needs batches for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The accelerator is the trainer's, should a transform import JAX.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    threading.Thread(target=_end_with_parent, name='end-with-parent', daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the trainer is gone, even by SIGKILL.

    The kernel's own means (PR_SET_PDEATHSIG) goes by the thread that started the process, and Grain
    starts its workers in threads that end early.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def portable(error: Exception) -> WorkerError:
    """Returns an error that says the same and survives the way to another process.

    An exception of any class need not: Grain would lose one that cannot be pickled, and wait for
    ever.
    """
    lines = traceback.format_exception_only(error)
    said = WorkerError(''.join(lines).rstrip())
    said.add_note(f"The worker's traceback:\n{''.join(traceback.format_tb(error.__traceback__))}")
    return said
