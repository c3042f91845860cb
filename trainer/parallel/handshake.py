# SPDX-License-Identifier: Apache-2.0
"""Connects the processes of a run before JAX does, to report which of them are missing.

Each process connects to the coordinator's port and sends a line of JSON, its hello. When all have
done so, process 0 answers 'go' and closes the port, which JAX then uses. Any other answer is an
error message, so every process reports the same problem.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trainer.config.errors import UserError

EXIT_PEER_FAILED = 75
_GRACE_SECS = 5.0


class PeerError(Exception):
    """Another process is missing, or belongs to another run."""

    exit_code = EXIT_PEER_FAILED


@dataclasses.dataclass(frozen=True)
class _Meeting:
    coordinator: str
    num_processes: int
    process_id: int
    timeout_secs: int


def meet(
    coordinator: str, num_processes: int, process_id: int, timeout_secs: int
) -> dict[socket.socket, int]:
    """Waits until every process has connected to process 0 on the coordinator's port.

    Args:
        coordinator: 'host:port' of process 0.
        num_processes: number of processes.
        process_id: index of this process.
        timeout_secs: how long to wait.

    Returns:
        Open connections with the index of the process at the other end: process 0, or in process 0
        all others.

    Raises:
        UserError: if the address is invalid or its port is in use.
        PeerError: if another process does not connect, or belongs to another run.
    """
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={coordinator!r}: expected 'host:port'")
    meeting = _Meeting(coordinator, num_processes, process_id, timeout_secs)
    deadline = time.monotonic() + timeout_secs
    if process_id == 0:
        return _receive_all(meeting, int(port), deadline)
    return {_say_hello(meeting, (host, int(port)), deadline): 0}


def _receive_all(meeting: _Meeting, port: int, deadline: float) -> dict[socket.socket, int]:
    """Process 0: waits for a hello from each other process, then lets all of them continue."""
    expected = set(range(1, meeting.num_processes))
    peers: dict[int, socket.socket] = {}
    with _listen(port) as server, contextlib.ExitStack() as stack:
        while missing := expected - set(peers):
            server.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                connection = stack.enter_context(server.accept()[0])
                hello = _read_line(connection, deadline)
            except (TimeoutError, BlockingIOError):
                names = ', '.join(map(str, sorted(missing)))
                problem = (
                    f'process {names} of {meeting.num_processes} did not connect within '
                    f'{meeting.timeout_secs} s (--init_timeout). Has it been started, and can it '
                    f'reach {meeting.coordinator}?'
                )
                _send_all(peers.values(), problem)
                raise PeerError(problem) from None
            problem = _check_hello(hello, meeting, peers) or ''
            if problem:
                _send_all((connection, *peers.values()), problem)
                raise PeerError(problem)
            if hello is not None:
                peers[hello['process_id']] = connection
        _send_all(peers.values(), 'go')
        stack.pop_all()  # On success the connections stay open, for `PeerWatch`.
    return {connection: number for number, connection in peers.items()}


def _send_all(peers: Iterable[socket.socket], text: str) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):  # `PeerWatch` reports processes that have exited.
            peer.sendall(f'{text}\n'.encode())


def _check_hello(hello: Any, meeting: _Meeting, peers: Mapping[int, Any]) -> str | None:
    if hello is None:
        return None  # A port scanner, or a process that died: keep waiting.
    number, count = hello['process_id'], hello['num_processes']
    if count != meeting.num_processes:
        return (
            f'process {number} was started with --num_processes={count}, process 0 with '
            f'{meeting.num_processes}'
        )
    if number in peers or number == 0:
        return f'two processes were started with --process_id={number}'
    return None


def _say_hello(meeting: _Meeting, address: tuple[str, int], deadline: float) -> socket.socket:
    hello = {'process_id': meeting.process_id, 'num_processes': meeting.num_processes}
    while True:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            peer = stack.enter_context(socket.create_connection(address, timeout=2))
            if peer.getsockname() == peer.getpeername():
                # Nobody listens yet, and the kernel chose this very port for the client side: the
                # socket is connected to itself. Reset it, because closing it would block the port
                # for process 0 for a minute.
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                raise ConnectionError
            peer.sendall(f'{json.dumps(hello)}\n'.encode())
            # Wait a little longer than process 0, which reports who is missing at its deadline.
            answer = _read_text(peer, deadline + _GRACE_SECS)
            if answer == 'go':
                stack.pop_all()
                return peer
            if answer:
                raise PeerError(answer)
        if time.monotonic() > deadline:
            raise PeerError(
                f'process {meeting.process_id} could not reach process 0 at {meeting.coordinator} '
                f'within {meeting.timeout_secs} s (--init_timeout). Is process 0 running, and is '
                'the port open?'
            )
        time.sleep(0.1)


@contextlib.contextmanager
def _listen(port: int) -> Iterator[socket.socket]:
    try:
        server = socket.create_server(('', port), reuse_port=False)
    except OSError as error:
        raise UserError(
            f'process 0 cannot listen on port {port} ({error.strerror}); choose a free port for '
            '--coordinator'
        ) from error
    with server:
        yield server


def _read_line(peer: socket.socket, deadline: float) -> Any:
    """Returns the JSON object of a hello, or None if the line is anything else."""
    text = _read_text(peer, min(deadline, time.monotonic() + 5))
    with contextlib.suppress(ValueError, KeyError, TypeError):
        hello = json.loads(text)
        return {name: int(hello[name]) for name in ('process_id', 'num_processes')}
    return None


def _read_text(peer: socket.socket, deadline: float) -> str:
    data = b''
    while not data.endswith(b'\n'):
        peer.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            received = peer.recv(1)  # Not more: the bytes after the line are for the next reader.
        except (TimeoutError, ConnectionError):
            break
        if not received:
            break
        data += received
    return data.decode(errors='replace').strip()
