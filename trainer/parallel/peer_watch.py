# SPDX-License-Identifier: Apache-2.0
"""Ends a process with a message as soon as another process of its run has died or hangs.

JAX notices only by missing heartbeats, minutes later, and aborts the process from C++. Here each
process keeps a connection to process 0, which the kernel closes when either of them dies. One that
is stopped or whose host is gone sends no sign of life any more; one that makes no progress says so.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from trainer import compat
from trainer.parallel import last_words

_KEY = 'trainer/watch'
_BYE, _LOST, _HUNG, _ALIVE = 'bye', 'lost', 'hung', 'alive'
EXIT_HUNG = 76
# A process that exits because of another one waits this long first: it may be about to report the
# same error itself. Process 0 waits longer, because JAX's coordinator ends with it.
_GRACE_SECS = 2.0
# A busy computer may not let a process run for some seconds.
_LEAST_SILENT_SECS = 8.0


class PeerWatch:
    """A thread that waits for other processes to end, or to hang.

    Attributes:
        on_hang: called with the number of a process that makes no progress; it ends this process.
    """

    on_hang: Callable[[int], None] | None = None

    def __init__(
        self,
        peers: Mapping[socket.socket, int],
        *,
        number: int,
        count: int,
        exit_code: int,
        keepalive_secs: int,
    ):
        """Starts the thread.

        Args:
            peers: connections with the index of the process at the other end: process 0, or in
                process 0 all others.
            number: index of this process.
            count: number of processes.
            exit_code: exit code of this process when another one has died.
            keepalive_secs: seconds after which a host that does not respond is considered dead.
        """
        self._exit_code = exit_code
        self._number, self._count = number, count
        self._peers: dict[Any, int] = dict(peers)
        # JAX aborts after between half of this time and all of it, because its own signs of life
        # come only twice in it. Until then the grace of process 0 has to pass, too.
        limit = max(_LEAST_SILENT_SECS, 0.4 * keepalive_secs - 2 * _GRACE_SECS)
        self._silence = Silence(self._peers.values(), limit)
        self._interval = min(limit / 4, 0.05 * keepalive_secs)
        self._closing, self._lost = threading.Event(), threading.Event()
        for peer in self._peers:
            _keep_alive(peer, keepalive_secs)
        self._thread = threading.Thread(target=self._watch, name='peer-watch', daemon=True)
        self._thread.start()

    def exit_if_peer_lost(self) -> None:
        """Called when this process fails; does not return if the cause is another process."""
        if self._lost.wait(_GRACE_SECS):
            self._thread.join()  # The thread ends the process.

    def close(self) -> None:
        """Tells the other processes that this one is about to exit normally."""
        self._closing.set()
        self._send_all(_BYE)

    def announce_hang(self) -> None:
        """Tells the other processes that this one makes no progress: they end, too."""
        self._send_all(f'{_HUNG} {self._number}')

    def _watch(self) -> None:
        next_sign = 0.0
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(self._interval):
                    number = self._peers[key.fileobj]
                    self._silence.hear(number)
                    for said in _receive(key.fileobj):
                        # Without this, a closed connection would be ready to read forever.
                        if said in ('', _BYE):
                            selector.unregister(key.fileobj)
                            self._silence.forget(number)
                        if said not in (_ALIVE, _BYE) and not self._closing.is_set():
                            self._react(said, number)
                if time.monotonic() > next_sign:
                    self._send_all(_ALIVE)
                    next_sign = time.monotonic() + self._interval
                if (silent := self._silence.find()) is not None and not self._closing.is_set():
                    self._exit('', silent, f'has not responded for {self._silence.limit:.0f} s')

    def _react(self, said: str, number: int) -> None:
        if not said.startswith(_HUNG):
            self._exit(said, number)
        if self._number == 0:
            self._send_all(said)
        if self.on_hang is not None:
            self.on_hang(int(said.split()[1]))

    def _send_all(self, text: str) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(f'{text}\n'.encode())

    def _exit(self, said: str, number: int, what: str = 'has ended unexpectedly') -> None:
        self._lost.set()
        if said.startswith(_LOST):  # Process 0 says which process it has lost.
            number = int(said.split()[1])
        if self._number == 0:
            self._send_all(f'{_LOST} {number}')
            time.sleep(2 * _GRACE_SECS)
        elif said:
            time.sleep(_GRACE_SECS)
        message = (
            f'process {number} of {self._count} {what}, and process '
            f'{self._number} cannot continue without it. Run the same command again to resume from '
            'the newest checkpoint.'
        )
        # Not `print`: the main thread may have locked `sys.stderr`.
        os.write(sys.stderr.fileno(), f'Error: {message}\n'.encode())
        last_words.record('failed', message)
        os._exit(self._exit_code)


def connect(timeout_secs: int) -> dict[socket.socket, int]:
    """Returns connections for a `PeerWatch`, once `jax.distributed` is initialized.

    Args:
        timeout_secs: how long to wait for the others.
    """
    client, number, count = compat.coordination_client(), jax.process_index(), jax.process_count()
    if number:
        address = client.blocking_key_value_get(_KEY, timeout_secs * 1000)
        host, _, port = address.rpartition(':')
        peer = socket.create_connection((host, int(port)), timeout=timeout_secs)
        peer.sendall(f'{number}\n'.encode())
        return {peer: 0}
    peers: dict[socket.socket, int] = {}
    # Port 0: the kernel chooses a free one, which the others read from JAX's key-value store.
    with socket.create_server(('', 0), backlog=count) as server:
        server.settimeout(timeout_secs)
        client.key_value_set(_KEY, f'{_host()}:{server.getsockname()[1]}')
        while len(peers) < count - 1:
            peer, _ = server.accept()
            peer.settimeout(timeout_secs)
            peers[peer] = int(peer.makefile().readline())
    return peers


def _keep_alive(peer: socket.socket, secs: int) -> None:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Sooner than JAX's own limit, at which it would abort without a message.
    every = max(1, secs // 6)
    for option in ('TCP_KEEPIDLE', 'TCP_KEEPINTVL'):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), every)
    if hasattr(socket, 'TCP_KEEPCNT'):
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _receive(peer: Any) -> list[str]:
    """Returns the messages of a peer; '' if the connection is closed."""
    try:
        return list(peer.recv(4096).decode(errors='replace').splitlines()) or ['']
    except OSError:
        return ['']


class Silence:
    """How long each process has been silent.

    Attributes:
        limit: seconds after which a process counts as gone.
    """

    def __init__(self, numbers: Iterable[int], limit: float):
        """Starts to count now."""
        self.limit = limit
        self._secs = dict.fromkeys(numbers, 0.0)
        self._tick: float | None = None

    def hear(self, number: int) -> None:
        """Records a sign of life."""
        self._secs[number] = 0.0

    def forget(self, number: int) -> None:
        """Expects nothing more of a process."""
        self._secs.pop(number, None)

    def find(self) -> int | None:
        """Returns a process that has been silent for too long, or None."""
        now = time.monotonic()
        # If this process was stopped itself, it has not heard the others.
        passed = min(now - (self._tick or now), self.limit / 4)
        self._tick = now
        self._secs = {number: secs + passed for number, secs in self._secs.items()}
        return next((n for n, secs in self._secs.items() if secs > self.limit), None)


def _host() -> str:
    """Returns the host name by which the others have already reached this process."""
    return compat.coordinator_address().rpartition(':')[0] or socket.gethostname()
