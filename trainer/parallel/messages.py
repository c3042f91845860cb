# SPDX-License-Identifier: Apache-2.0
"""Messages from all processes to the main process, over JAX's coordination service.

A collective would bring every value to every process, through the memory of its devices. Here only
the main process ever has those of the others.
"""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import jax

from trainer import compat
from trainer.parallel import processes

# A value travels in pieces: the service keeps each until it is read, and gRPC limits its size.
_PIECE_BYTES = 2**21
_MORE, _LAST = b'\0', b'\1'
# Not a time limit: a message may take as long as the computation that it waits for. If its sender
# dies, the peer watch ends this process.
_POLL_MS = 10_000

_numbers = itertools.count()


class Messages:
    """A series of messages between the processes of a run.

    All processes create it, and call its methods, in the same order.
    """

    def __init__(self) -> None:
        # No key is ever used twice: a slow process may still be reading an older series.
        self._series = next(_numbers)
        self._sent = 0

    def gather(self, value: Any) -> list[Any] | None:
        """Sends a value of each process to the main process.

        Args:
            value: anything that can be pickled.

        Returns:
            The values by process index in the main process, None in the others.
        """
        count = jax.process_count()
        if count == 1:
            return [value]
        key = self._next_key()
        if not processes.is_main_process():
            _send(f'{key}/{jax.process_index()}', value)
            return None
        return [value, *(_receive(f'{key}/{sender}') for sender in range(1, count))]

    def broadcast(self, value: Any = None) -> Any:
        """Sends a value of the main process to all others.

        Args:
            value: anything that can be pickled; of the main process only.

        Returns:
            That value, in every process.
        """
        count = jax.process_count()
        if count == 1:
            return value
        key = self._next_key()
        if not processes.is_main_process():
            return _receive(f'{key}/{jax.process_index()}')
        for receiver in range(1, count):
            _send(f'{key}/{receiver}', value)
        return value

    def _next_key(self) -> str:
        self._sent += 1
        return f'trainer/messages/{self._series}/{self._sent}'


def _send(key: str, value: Any) -> None:
    client, content = compat.coordination_client(), pickle.dumps(value)
    starts = range(0, len(content), _PIECE_BYTES)
    for number, start in enumerate(starts):
        flag = _LAST if number == len(starts) - 1 else _MORE
        piece = content[start : start + _PIECE_BYTES]
        client.key_value_set_bytes(f'{key}/{number}', flag + piece)


def _receive(key: str) -> Any:
    client, pieces = compat.coordination_client(), []
    for number in itertools.count():
        piece = _wait_for(client, f'{key}/{number}')
        # Otherwise the service, which is in the main process, would keep all messages of the run.
        client.key_value_delete(f'{key}/{number}')
        pieces.append(piece[1:])
        if piece[:1] == _LAST:
            break
    return pickle.loads(b''.join(pieces))


def _wait_for(client: Any, key: str) -> bytes:
    while True:
        try:
            return client.blocking_key_value_get_bytes(key, _POLL_MS)
        except Exception as error:
            if not compat.is_timeout(error):
                raise
