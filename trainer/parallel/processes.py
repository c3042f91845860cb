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
import pickle
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


def is_cluster_detected(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the environment is that of one process among several that JAX can connect."""
    env = os.environ if environment is None else environment
    if 'SLURM_STEP_NODELIST' in env:
        # Of the step, not of the job: a batch script itself is one process.
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
        What ends this process when another one is gone, or None where no cluster is declared or
        is_cluster_detected.

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
    # JAX ends the process from C++, without a word on who is missing; so we meet first ourselves.
    where = cluster.coordinator, cluster.num_processes, cluster.process_id
    peers = meet(*where, cluster.timeout_secs)
    # Before JAX connects them: there it would wait for one that has died, and abort.
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
    """Whether this process writes what is written once: files, and the user's screen."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def check_agreement(items: Mapping[str, Any]) -> None:
    """Makes sure that all processes have equal items; all of them must call it.

    Args:
        items: by name; what `json.dumps` makes of a value is compared.

    Raises:
        UserError: in every process, saying which processes differ from process 0, and in what.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(items, sort_keys=True, default=str)
    hashes = _gather(np.array([zlib.crc32(text.encode())], np.uint32))
    if (hashes == hashes[0]).all():
        return
    first, *others = gather(json.loads(text))
    groups: dict[str, list[str]] = {}
    for number, other in enumerate(others, 1):
        if changes := diff.diff(first, other):
            groups.setdefault(diff.format_diff(changes), []).append(str(number))
    told = [f'process {", ".join(numbers)}:\n{lines}' for lines, numbers in groups.items()]
    raise UserError('the processes of this run do not agree. From process 0 to\n' + '\n'.join(told))


def gather(value: Any) -> list[Any]:
    """Returns the JSON value of every process, in their order; all of them must call it."""
    if jax.process_count() == 1:
        return [value]
    return [json.loads(text) for text in _gather_bytes(json.dumps(value).encode())]


def gather_objects(value: Any) -> list[Any]:
    """Returns the values of all processes, such as arrays of any dtype; all must call it."""
    if jax.process_count() == 1:
        return [value]
    return [pickle.loads(content) for content in _gather_bytes(pickle.dumps(value))]


def sum_over_processes(value: int) -> int:
    """Returns the sum of every process's unsigned 64-bit `value`, modulo 2^64."""
    if jax.process_count() == 1:
        return value
    halves = _gather(np.array([value >> 32, value & 0xFFFFFFFF], np.uint32))
    return sum((int(high) << 32) + int(low) for high, low in halves) % 2**64


def wait_for_all(where: str, timeout_secs: int) -> bool:
    """Returns whether all processes call this within some seconds.

    Args:
        where: the same text in all of them, and another one at each call.
        timeout_secs: how long to wait for the others.
    """
    if jax.process_count() == 1:
        return True
    from orbax.checkpoint.multihost import get_barrier_sync_fn

    try:
        get_barrier_sync_fn()(key=where, timeout_ms=1000 * timeout_secs)
    except Exception:  # Of the runtime, for want of time or because another one is gone.
        return False
    return True


def _gather_bytes(content: bytes) -> list[bytes]:
    sizes = _gather(np.array([len(content)], np.uint32))[:, 0]
    padded = np.frombuffer(content.ljust(sizes.max()), np.uint8)
    return [row[:size].tobytes() for row, size in zip(_gather(padded), sizes, strict=True)]


def _gather(row: np.ndarray) -> np.ndarray:
    """Returns the row (n,) of every process, as (processes, n)."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(row))


@contextlib.contextmanager
def exit_together(watch: PeerWatch, stop: StopRequest) -> Iterator[None]:
    """Ends this process at once when what runs inside fails, or when another process is gone.

    An ordinary exit would wait for the others, who wait in a collective for this process.

    Args:
        watch: from `join`.
        stop: of the run.
    """
    try:
        yield
        watch.close()
    except BaseException as error:
        if stop.all_failed:
            watch.close()
            raise
        if isinstance(error, UserError):
            print(f'Error: {full_text(error)}', file=sys.stderr)
            code = error.exit_code
        else:
            watch.exit_if_peer_lost()
            print(traces.shorten(error), file=sys.stderr)
            code = 1
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
