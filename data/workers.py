# SPDX-License-Identifier: Apache-2.0
"""Worker processes of Grain: start, error reports, and exit with the parent process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from typing import Any

from .compat import mark_grain_flags_parsed


class WorkerError(RuntimeError):
    """A worker process failed or died; the message includes the error of the worker."""


def prefetch_in_workers(dataset: Any, workers: int, buffer: int) -> Any:
    """Returns a Grain dataset whose elements are computed by worker processes.

    Args:
        dataset: a `grain.IterDataset`.
        workers: number of processes; 0 computes the elements in this one.
        buffer: number of elements that each worker prefetches.
    """
    import grain.python as grain

    mark_grain_flags_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer)
    return dataset.mp_prefetch(options, worker_init_fn=_start)


def _start(index: int, count: int) -> None:
    """Initializes a worker process."""
    # A signal to the process group asks the trainer to save and exit; until then it needs batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # If a transform imports JAX, it must not occupy the accelerator of the trainer.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    threading.Thread(target=_exit_with_parent, name='exit-with-parent', daemon=True).start()


def _exit_with_parent() -> None:
    """Exits this process when the trainer has ended, even by SIGKILL.

    PR_SET_PDEATHSIG of the kernel depends on the thread that started the process, and Grain starts
    its workers in short-lived threads.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Returns when the parent has ended, in whatever way.
        parent.join()
        os._exit(1)


def to_portable(error: Exception) -> WorkerError:
    """Returns an error with the same message that can be pickled.

    Other exceptions may not pickle: Grain would lose such an exception and wait forever.
    """
    lines = traceback.format_exception_only(error)
    portable = WorkerError(''.join(lines).rstrip())
    portable.add_note(
        f"The worker's traceback:\n{''.join(traceback.format_tb(error.__traceback__))}"
    )
    return portable
