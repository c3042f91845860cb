# SPDX-License-Identifier: Apache-2.0
"""Connects the processes of a run, and checks that they agree.

The collectives, the coordinator and its heartbeats are JAX's own. This module adds an actionable
error if a process is missing, and a check that all processes run the same thing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from trainer import compat
from trainer.config import diff, traces
from trainer.config.errors import UserError, full_text
from trainer.parallel.handshake import EXIT_PEER_FAILED, meet
from trainer.parallel.peer_watch import PeerWatch, connect
from trainer.parallel.signals import StopRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes of a run.

    Attributes:
        coordinator: 'host:port' of process 0, or None to let JAX detect the cluster.
        num_processes: number of processes.
        process_id: index of this process, from 0.
        timeout_secs: how long to wait for the others at the start.
        heartbeat_secs: seconds without a heartbeat after which a process is considered dead, which
            ends the run.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout_secs: int = 300
    heartbeat_secs: int = 100


def is_cluster_detected(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the environment is that of one of several processes that JAX can connect."""
    env = os.environ if environment is None else environment
    if 'SLURM_STEP_NODELIST' in env:
        # The tasks of the job step, not of the job: the batch script itself is one process.
        return int(env.get('SLURM_STEP_NUM_TASKS', env.get('SLURM_NTASKS', 1))) > 1
    if 'OMPI_COMM_WORLD_SIZE' in env:
        return int(env['OMPI_COMM_WORLD_SIZE']) > 1
    if 'JAX_COORDINATOR_ADDRESS' in env:
        return True
    hosts = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES', '')
    if ',' in hosts or int(env.get('MEGASCALE_NUM_SLICES', 1)) > 1:
        return True
    return environment is None and compat.tpu_vm_processes() > 1


def join(cluster: Cluster) -> PeerWatch | None:
    """Connects this process with the others of its run, before any backend is started.

    Returns:
        The watch that ends this process if another one dies, or None if no cluster is declared or
        detected.

    Raises:
        UserError: if the declaration is incomplete or the coordinator's port is in use.
        PeerError: if other processes do not connect, or belong to another run.
    """
    declared = {
        '--coordinator': cluster.coordinator,
        '--num_processes': cluster.num_processes,
        '--process_id': cluster.process_id,
    }
    missing = [name for name, value in declared.items() if value is None]
    if len(missing) == len(declared) and not is_cluster_detected():
        return None
    if missing and not is_cluster_detected():
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
        number, count = jax.process_index(), jax.process_count()
        return _watch(connect(cluster.timeout_secs), number, count, cluster)
    assert cluster.coordinator and cluster.num_processes and cluster.process_id is not None
    if not 0 <= cluster.process_id < cluster.num_processes:
        raise UserError(
            f'--process_id={cluster.process_id}: expected 0 to {cluster.num_processes - 1}'
        )
    # If a process is missing, JAX aborts from C++ without naming it; so they connect here first.
    where = cluster.coordinator, cluster.num_processes, cluster.process_id
    peers = meet(*where, cluster.timeout_secs)
    # Started before JAX connects the processes: JAX would wait for one that has died, and abort.
    watch = _watch(peers, cluster.process_id, cluster.num_processes, cluster)
    jax.distributed.initialize(*where, **timeouts)
    return watch


def _watch(
    peers: Mapping[socket.socket, int], number: int, count: int, cluster: Cluster
) -> PeerWatch:
    return PeerWatch(
        peers,
        number=number,
        count=count,
        exit_code=EXIT_PEER_FAILED,
        keepalive_secs=cluster.heartbeat_secs,
    )


def is_main_process() -> bool:
    """Whether this is the main process (process 0), which writes the files and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def check_agreement(items: Mapping[str, Any]) -> None:
    """Checks that all processes have equal items; all of them must call it.

    Args:
        items: values by name; compared as `json.dumps` writes them.

    Raises:
        UserError: in every process, naming the processes that differ from process 0, and the
            differences.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(items, sort_keys=True, default=str)
    # Hashes first: the texts of many processes are long, and usually equal.
    hashes = _gather(np.array([zlib.crc32(text.encode())], np.uint32))
    if (hashes == hashes[0]).all():
        return
    first, *others = gather(json.loads(text))
    groups: dict[str, list[str]] = {}
    for number, other in enumerate(others, 1):
        if changes := diff.diff(first, other):
            groups.setdefault(diff.format_diff(changes), []).append(str(number))
    texts = [f'process {", ".join(numbers)}:\n{lines}' for lines, numbers in groups.items()]
    raise UserError('the processes of this run differ. From process 0 to\n' + '\n'.join(texts))


def gather(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, by process index; all of them must call it."""
    if jax.process_count() == 1:
        return [value]
    return [json.loads(text) for text in _gather_bytes(json.dumps(value).encode())]


def sum_over_processes(value: int) -> int:
    """Returns the sum of every process's unsigned 64-bit `value`, modulo 2^64."""
    if jax.process_count() == 1:
        return value
    # In two halves: without x64, JAX has no 64-bit integers.
    halves = _gather(np.array([value >> 32, value & 0xFFFFFFFF], np.uint32))
    return sum((int(high) << 32) + int(low) for high, low in halves) % 2**64


def wait_for_all(where: str, timeout_secs: int) -> bool:
    """Waits for all processes to call this; returns whether they did in time.

    Args:
        where: the key of the barrier: equal in all processes, different at each call.
        timeout_secs: how long to wait for the others.
    """
    if jax.process_count() == 1:
        return True
    from orbax.checkpoint.multihost import get_barrier_sync_fn

    # A barrier of the coordination service: a collective on the devices has no timeout.
    try:
        get_barrier_sync_fn()(key=where, timeout_ms=1000 * timeout_secs)
    except Exception:  # Errors of the runtime: a timeout, or another process has died.
        return False
    return True


def _gather_bytes(content: bytes) -> list[bytes]:
    # An all-gather needs equal shapes, so the bytes are padded to the longest.
    sizes = _gather(np.array([len(content)], np.uint32))[:, 0]
    padded = np.frombuffer(content.ljust(sizes.max()), np.uint8)
    return [array[:size].tobytes() for array, size in zip(_gather(padded), sizes, strict=True)]


def _gather(array: np.ndarray) -> np.ndarray:
    """Returns the array (n,) of every process, as (processes, n)."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))


@contextlib.contextmanager
def exit_together(watch: PeerWatch, stop: StopRequest) -> Iterator[None]:
    """Exits at once if the block fails or another process has died.

    A normal exit would wait for the other processes, which wait for this one in a collective.

    Args:
        watch: what `join` returned.
        stop: stop request of the run.
    """
    try:
        yield
        watch.close()
    except BaseException as error:
        if stop.all_failed:  # Then no process is left in a collective, and all may exit normally.
            watch.close()
            raise
        if isinstance(error, UserError):
            print(f'Error: {full_text(error)}', file=sys.stderr)
            code = error.exit_code
        else:
            # Another process may have died first, and the error here is only a consequence.
            watch.exit_if_peer_lost()
            print(traces.format_traceback(error), file=sys.stderr)
            code = 1
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
