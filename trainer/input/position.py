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
from trainer.parallel.mesh import ProcessRows


class DataPosition:
    """Counts the batches that steps have consumed, and moves the data to where a run resumes.

    Most data is a function of the position, which is the number of steps. A stream has a state in
    each process besides, which is kept with the checkpoint.
    """

    def __init__(self, data: TrainData):
        """Has counted nothing.

        Args:
            data: the training data.
        """
        self._data = data
        self._digest = DataDigest()
        self._state: Any = None
        self._rows: ProcessRows | None = None
        self._places: np.ndarray | None = None

    def add(self, batch: LoadedBatch) -> None:
        """Counts a batch that a step has consumed; batches come in their order, each once."""
        ids = batch.ids
        if batch.rows is not self._rows:
            self._rows = batch.rows
            owned = None if batch.rows is None else batch.rows.held[batch.rows.owned]
            self._places = owned
        if batch.rows is not None:
            ids = ids[:, batch.rows.owned]
        self._digest.add(batch.start, ids, self._places)
        if batch.state is not None:
            self._state = batch.state

    def digest(self) -> str:
        """Returns the digest of the data over all processes; all of them must call it."""
        return f'{processes.sum_over_processes(int(self._digest.value, 16)):016x}'

    def meta(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps; all processes must call it."""
        meta: dict[str, Any] = {'data_digest': self.digest()}
        if self._data.is_stream:
            meta['data_states'] = processes.gather(self._state)
        return meta

    def restart(self) -> None:
        """Begins with the first batch."""
        self._digest, self._state = DataDigest(), None
        self._data.restore(0, None)

    def resume(self, step: int) -> None:
        """Continues in this process after the batch that was counted last.

        A stream may have read further since.

        Args:
            step: number of completed updates.
        """
        self._data.restore(step, self._state)

    def restore(self, step: int, meta: Mapping[str, Any], *, may_restart: bool) -> bool:
        """Goes to where a checkpoint was saved.

        Args:
            step: of the checkpoint.
            meta: what `meta` returned, and more.
            may_restart: whether a stream that cannot continue there restarts from its beginning.

        Returns:
            Whether the data continues exactly where it was.

        Raises:
            UserError: if a stream cannot continue, unless it may restart.
        """
        self._digest, self._state = DataDigest(), None
        if processes.is_main_process():  # The others count only what they read from here on.
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
                problem = str(error)
        if problem is None:
            return True
        if not may_restart:
            raise UserError(
                f'the data of this run cannot resume at step {step:,}: {problem}\n'
                'With --allow_config_change it restarts from the beginning: examples that this '
                'pass has used are used again.'
            )
        self._state = None
        self._data.restore(step, None)
        return False


def _problem(states: Any) -> str | None:
    if states is None:
        return 'it is a stream, and the checkpoint was saved with data that is none.'
    if len(states) != jax.process_count():
        return (
            f'it is a stream, of which each process keeps a place of its own, and the checkpoint '
            f'is of {len(states)} where this run has {jax.process_count()}. Start it with '
            f'{len(states)} (a source that is no stream goes on with any number).'
        )
    return None
