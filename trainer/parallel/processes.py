# SPDX-License-Identifier: Apache-2.0
"""One run of several processes: how they find each other and make sure that they agree.

The collectives, the coordinator and its heartbeats are JAX's own. What is here is what JAX leaves
out: an error that a person can act on when a peer is missing, and a check that all peers run the
same thing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.parallel.watch import PeerWatch

EXIT_PEER_FAILED = 75


class PeerError(Exception):
    """Another process is missing, or not one of this run."""

    exit_code = EXIT_PEER_FAILED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the processes of a run meet.

    Attributes:
        coordinator: 'host:port' of process 0, or None to let JAX detect the cluster.
        num_processes: how many there are.
        process_id: which one this is.
        timeout_secs: how long to wait for the others at the start.
        heartbeat_secs: a process that is silent for so long counts as dead, and ends the run.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout_secs: int = 300
    heartbeat_secs: int = 100


def detected(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the environment is that of one process among several that JAX can connect."""
    env = os.environ if environment is None else environment
    if 'SLURM_STEP_NODELIST' in env:
        # Of the step, not of the job: a batch script itself is one process.
        return int(env.get('SLURM_STEP_NUM_TASKS', env.get('SLURM_NTASKS', 1))) > 1
    if 'OMPI_COMM_WORLD_SIZE' in env:
        return int(env['OMPI_COMM_WORLD_SIZE']) > 1
    if 'JAX_COORDINATOR_ADDRESS' in env:
        return True
    hosts = env.get('TPU_WORKER_HOSTNAMES', '')
    return ',' in hosts or int(env.get('MEGASCALE_NUM_SLICES', 1)) > 1


def join(cluster: Cluster) -> None:
    """Connects this process with the others of its run, before any backend is started.

    Does nothing where no cluster is declared or detected.

    Raises:
        UserError: if the declaration is incomplete or the coordinator's port is taken.
        PeerError: if the others do not come, or are not the ones that were expected.
    """
    declared = {
        '--coordinator': cluster.coordinator,
        '--num_processes': cluster.num_processes,
        '--process_id': cluster.process_id,
    }
    missing = [name for name, value in declared.items() if value is None]
    if len(missing) == len(declared) and not detected():
        return
    if missing and not detected():
        raise UserError(
            f'{", ".join(missing)} is missing: several processes need all of '
            f'{", ".join(declared)}, unless a scheduler declares them'
        )
    timeouts: dict[str, Any] = dict(
        initialization_timeout=cluster.timeout_secs,
        heartbeat_timeout_seconds=cluster.heartbeat_secs,
    )
    if missing:
        jax.distributed.initialize(**timeouts)
        return
    assert cluster.coordinator and cluster.num_processes and cluster.process_id is not None
    if not 0 <= cluster.process_id < cluster.num_processes:
        raise UserError(
            f'--process_id={cluster.process_id}: expected 0 to {cluster.num_processes - 1}'
        )
    # JAX ends the process from C++, without a word on who is missing; so we meet first ourselves.
    _meet(cluster)
    jax.distributed.initialize(
        cluster.coordinator, cluster.num_processes, cluster.process_id, **timeouts
    )


def is_primary() -> bool:
    """Whether this process writes what is written once: files, and the user's screen."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def check_agreement(items: Mapping[str, Any]) -> None:
    """Makes sure that all processes have equal items; all of them must call it.

    Args:
        items: by name; what `json.dumps` makes of a value is compared.

    Raises:
        UserError: in every process, naming the processes and the items that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    hashes = [
        zlib.crc32(json.dumps(v, sort_keys=True, default=str).encode()) for v in items.values()
    ]
    gathered = np.asarray(multihost_utils.process_allgather(np.array(hashes, np.uint32)))
    differing = [
        f'process {process}: {", ".join(name for name, d in zip(items, row, strict=True) if d)}'
        for process, row in enumerate(gathered != gathered[0])
        if row.any()
    ]
    if differing:
        mine = '\n'.join(f'  {name}: {value}' for name, value in items.items())
        raise UserError(
            'the processes of this run do not agree. Different from process 0 are\n  '
            + '\n  '.join(differing)
            + f'\nHere, in process {jax.process_index()}:\n{mine}'
        )


def sum_over_processes(value: int) -> int:
    """Returns the sum of every process's unsigned 64-bit `value`, modulo 2^64."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    halves = np.array([value >> 32, value & 0xFFFFFFFF], np.uint32)
    gathered = np.asarray(multihost_utils.process_allgather(halves)).astype(object)
    return int(sum((int(high) << 32) + int(low) for high, low in gathered)) % 2**64


@contextlib.contextmanager
def ending_together(cluster: Cluster) -> Iterator[None]:
    """Ends this process at once when what runs inside fails, or when another process is gone.

    An ordinary exit would wait for the others, who wait in a collective for this process.
    """
    watch = PeerWatch(EXIT_PEER_FAILED, cluster.timeout_secs, cluster.heartbeat_secs)
    try:
        yield
        watch.close()
    except BaseException as error:
        if isinstance(error, UserError):
            print(f'Error: {error}', file=sys.stderr)
            code = error.exit_code
        else:
            watch.blame()
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


def _meet(cluster: Cluster) -> None:
    """Waits until every process has said hello to process 0 on the coordinator's port."""
    assert cluster.coordinator is not None
    host, _, port = cluster.coordinator.rpartition(':')
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={cluster.coordinator!r}: expected 'host:port'")
    deadline = time.monotonic() + cluster.timeout_secs
    if cluster.process_id == 0:
        _receive_all(cluster, int(port), deadline)
    else:
        _say_hello(cluster, (host, int(port)), deadline)


def _receive_all(cluster: Cluster, port: int, deadline: float) -> None:
    """Process 0: collects a hello of each other process, then lets all of them go on."""
    expected = set(range(1, cluster.num_processes or 1))
    peers: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port))
        while missing := expected - set(peers):
            server.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                connection = stack.enter_context(server.accept()[0])
                hello = _read_line(connection, deadline)
            except (TimeoutError, BlockingIOError):
                names = ', '.join(map(str, sorted(missing)))
                raise PeerError(
                    f'process {names} of {cluster.num_processes} did not come within '
                    f'{cluster.timeout_secs} s (--init_timeout). Has it been started, and can it '
                    f'reach {cluster.coordinator}?'
                ) from None
            problem = _check_hello(hello, cluster, peers)
            if problem:
                for peer in (connection, *peers.values()):
                    peer.sendall(f'{problem}\n'.encode())
                raise PeerError(problem)
            if hello is not None:
                peers[hello['process_id']] = connection
        for peer in peers.values():
            peer.sendall(b'go\n')


def _check_hello(hello: Any, cluster: Cluster, peers: Mapping[int, Any]) -> str | None:
    if hello is None:
        return None  # A port scanner, or a process that died: not one of ours yet.
    number, count = hello['process_id'], hello['num_processes']
    if count != cluster.num_processes:
        return (
            f'process {number} was started with --num_processes={count}, process 0 with '
            f'{cluster.num_processes}'
        )
    if number in peers or number == 0:
        return f'two processes were started with --process_id={number}'
    return None


def _say_hello(cluster: Cluster, address: tuple[str, int], deadline: float) -> None:
    hello = {'process_id': cluster.process_id, 'num_processes': cluster.num_processes}
    while True:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=2) as peer:
            peer.sendall(f'{json.dumps(hello)}\n'.encode())
            answer = _read_text(peer, deadline)
            if answer == 'go':
                return
            if answer:
                raise PeerError(answer)
        if time.monotonic() > deadline:
            raise PeerError(
                f'process {cluster.process_id} did not reach process 0 at {cluster.coordinator} '
                f'within {cluster.timeout_secs} s (--init_timeout). Is process 0 running, and is '
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
    """Returns the JSON object of a hello, or None if there was no such thing."""
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
            received = peer.recv(4096)
        except (TimeoutError, ConnectionError):
            break
        if not received:
            break
        data += received
    return data.decode(errors='replace').strip()
