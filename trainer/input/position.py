# SPDX-License-Identifier: Apache-2.0
"""The position of a run in its data: the digest of what it has consumed, and a stream's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.input.batch import LoadedBatch
from trainer.input.data import TrainData
from trainer.input.digest import DataDigest
from trainer.parallel import processes
from trainer.parallel.mesh import LocalExamples


class DataPosition:
    """Tracks the batches that the steps have consumed, and moves the data to where a run resumes.

    Most data is a function of the position, which is the number of steps. A stream also has a state
    in each process, which is saved with the checkpoint.
    """

    def __init__(self, data: TrainData):
        """Starts at the beginning of the data.

        Args:
            data: the training data.
        """
        self._data = data
        self._digest = DataDigest()
        self._state: Any = None
        self._rows: LocalExamples | None = None
        self._row_indices: np.ndarray | None = None

    def add(self, batch: LoadedBatch) -> None:
        """Records a batch that a step has consumed; call it for each batch once, in order."""
        ids = batch.ids
        if batch.rows is not self._rows:
            self._rows = batch.rows
            rows = batch.rows
            # Processes may read the same rows: only one of them counts each row.
            self._row_indices = None if rows is None else rows.indices[rows.is_owned]
        if batch.rows is not None:
            ids = ids[:, batch.rows.is_owned]
        self._digest.add(batch.start, ids, self._row_indices)
        if batch.state is not None:
            self._state = batch.state

    def digest(self) -> str:
        """Returns the digest of the data over all processes; all of them must call it."""
        # Each process has the digest of its own rows; the sum does not depend on how they are
        # divided.
        return f'{processes.sum_over_processes(int(self._digest.value, 16)):016x}'

    def meta(self) -> dict[str, Any]:
        """Returns the metadata for a checkpoint; all processes must call it."""
        meta: dict[str, Any] = {'data_digest': self.digest()}
        if self._data.is_stream:
            # Each process reads its own part of a stream, so each has a state.
            meta['data_states'] = processes.gather(self._state)
        return meta

    def restart(self, step: int = 0) -> None:
        """Moves the data to a step without a checkpoint; a stream restarts from its beginning.

        Args:
            step: number of completed updates.
        """
        self._digest, self._state = DataDigest(), None
        # Also after a failed start: the prefetcher may have moved a stream.
        self._data.restore(step, None)

    def resume(self, step: int) -> None:
        """Moves the data of this process back to the batch after the last recorded one.

        The prefetcher may have read a stream further ahead.

        Args:
            step: number of completed updates.
        """
        self._data.restore(step, self._state)

    def restore(self, step: int, meta: Mapping[str, Any], *, may_restart: bool) -> bool:
        """Moves the data to the position of a checkpoint.

        Args:
            step: step of the checkpoint.
            meta: metadata of the checkpoint, which includes that of `meta`.
            may_restart: whether a stream that cannot continue there restarts from its beginning.

        Returns:
            True if the data continues exactly, False if it restarts.

        Raises:
            UserError: if a stream cannot continue, unless it may restart.
        """
        self._digest, self._state = DataDigest(), None
        # Digests are summed over processes, so only one of them restores the total so far.
        if processes.is_main_process():
            self._digest.restore(meta['data_digest'])
        if not self._data.is_stream:
            return True
        states = meta.get('data_states')
        problem = _problem(states)
        if problem is None and states is not None:
            self._state = states[jax.process_index()]
            try:
                self._data.restore(step, self._state)
            except ValueError as error:
                # From the loader, which alone knows why its state does not fit.
                problem = str(error)
        if problem is None:
            return True
        if not may_restart:
            raise UserError(
                f'the data of this run cannot resume at step {step:,}: {problem}\n'
                'With --allow_config_change it restarts from the beginning: examples that were '
                'used in this pass are used again.'
            )
        self._state = None
        self._data.restore(step, None)
        return False


def _problem(states: Any) -> str | None:
    if states is None:
        return 'it is a stream, and the checkpoint was saved with data that is not a stream.'
    if len(states) != jax.process_count():
        return (
            f'each process has its own position in a stream; the checkpoint has {len(states)} '
            f'processes, and this run {jax.process_count()}. Start the run with {len(states)} '
            'processes (only a source with random access resumes with any number).'
        )
    return None
