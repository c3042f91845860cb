# SPDX-License-Identifier: Apache-2.0
"""What a run has read of its data: the proof of the order, and where a stream stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from trainer.config.errors import UserError
from trainer.input.prefetch import Prefetcher
from trainer.parallel import processes


class Consumed:
    """Counts the batches that steps have consumed, and takes the data to where it goes on.

    Most data is a function of the position, and its place is the number of steps. A stream has a
    place in each process besides, which is kept with the checkpoint.
    """

    def __init__(self, data: Any):
        """Has counted nothing.

        Args:
            data: the loader of the training batches.
        """
        self._data = data
        self._digest: Any = data.new_digest()
        self._state: Any = None

    def add(self, batches: Prefetcher, step: int) -> None:
        """Counts the batches before a step that have not been counted yet."""
        rows = batches.rows
        for start, ids in batches.take_ids(step):
            if rows is None:
                self._digest.add(start, ids)
            else:
                self._digest.add(start, ids[:, rows.owned], rows.held[rows.owned])
        self._state = batches.state or self._state

    def digest(self) -> str:
        """Returns the digest of the data over all processes; all of them must call it."""
        return f'{processes.sum_over_processes(int(self._digest.value, 16)):016x}'

    def meta(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps; all processes must call it."""
        meta: dict[str, Any] = {'data_digest': self.digest()}
        if self._is_stream:
            meta['data_states'] = processes.gather(self._state)
        return meta

    def restart(self) -> None:
        """Begins with the first batch."""
        self._digest, self._state = self._data.new_digest(), None
        if self._is_stream:
            self._data.restore(0, None)

    def go_on(self, step: int) -> None:
        """Goes on in this process behind the batch that was counted last; another may be read."""
        if self._is_stream:
            self._data.restore(step, self._state)

    def restore(self, step: int, meta: Mapping[str, Any], *, begin_anew: bool) -> bool:
        """Goes to where a checkpoint was saved.

        Args:
            step: of the checkpoint.
            meta: what `meta` returned, and more.
            begin_anew: where a stream cannot go on, begin it anew.

        Returns:
            Whether the data goes on exactly where it stood.

        Raises:
            UserError: if a stream cannot go on, unless it may begin anew.
        """
        self._digest, self._state = self._data.new_digest(), None
        if processes.is_primary():  # The others count only what they read from here on.
            self._digest.restore(meta['data_digest'])
        if not self._is_stream:
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
        if not begin_anew:
            raise UserError(
                f'the data of this run cannot resume at step {step:,}: {problem}\n'
                'With --allow_config_change it restarts from the beginning: examples that this '
                'pass has used are used again.'
            )
        self._state = None
        self._data.restore(step, None)
        return False

    @property
    def _is_stream(self) -> bool:
        return hasattr(self._data, 'restore')


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
