# SPDX-License-Identifier: Apache-2.0
"""Processes that connect and agree, or report what is wrong."""

import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import pytest

from trainer.parallel import processes
from trainer.parallel.handshake import meet

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from trainer.config.errors import UserError
from trainer.parallel import processes
from trainer.parallel.handshake import PeerError, meet

coordinator, count, number, timeout, item = sys.argv[1:]
try:
    watch = processes.join(processes.Cluster(
        coordinator=coordinator, num_processes=int(count), process_id=int(number),
        timeout_secs=int(timeout)))
    processes.check_agreement({'config': 'same', 'data': item})
    print('sum', processes.sum_over_processes(2**63 + 2**32 + int(number)))
    watch.close()
except (UserError, PeerError) as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""


def free_port() -> int:
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def start(port, count, number, *, timeout=60, item='a'):
    arguments = (f'127.0.0.1:{port}', count, number, timeout, item)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen(
        [sys.executable, '-c', PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(*running):
    outputs = [process.communicate(timeout=120)[0] for process in running]
    return [process.returncode for process in running], outputs


def test_three_processes_meet_agree_and_add_up():
    port = free_port()
    codes, outputs = finish(*(start(port, 3, i) for i in (2, 1, 0)))
    assert codes == [0, 0, 0], outputs
    total = (3 * (2**63 + 2**32) + 3) % 2**64
    assert all(f'sum {total}' in output for output in outputs)


@pytest.mark.slow
def test_a_disagreement_names_the_process_and_the_item():
    port = free_port()
    codes, outputs = finish(start(port, 3, 0), start(port, 3, 1), start(port, 3, 2, item='b'))
    assert codes == [2, 2, 2], outputs
    assert all("process 2:\n  data  'a' -> 'b'\n" in output for output in outputs)


@pytest.mark.slow
def test_a_missing_process_is_named_by_the_others():
    port = free_port()
    codes, outputs = finish(start(port, 3, 0, timeout=3), start(port, 3, 2, timeout=3))
    assert codes == [75, 75], outputs
    for output in outputs:
        assert 'process 1 of 3 did not connect within 3 s' in output


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, 1])
def test_a_process_that_dies_before_jax_has_connected_it_is_named(number):
    """JAX would wait for it until the timeout, and abort."""
    port = free_port()
    dying = f"""
import os, signal
from trainer.parallel.handshake import meet

meet('127.0.0.1:{port}', 3, {number}, 60)
os.kill(os.getpid(), signal.SIGKILL)
"""
    first = subprocess.Popen([sys.executable, '-c', dying], env={**os.environ, 'PYTHONPATH': ROOT})
    codes, outputs = finish(start(port, 3, 1 - number), start(port, 3, 2))
    assert first.wait() == -signal.SIGKILL
    assert codes == [75, 75], outputs
    assert all(f'process {number} of 3 has ended unexpectedly' in o for o in outputs), outputs


@pytest.mark.slow
def test_a_missing_process_0_is_named():
    codes, outputs = finish(start(free_port(), 2, 1, timeout=2))
    assert codes == [75]
    assert 'process 1 could not reach process 0' in outputs[0]


@pytest.mark.slow
def test_processes_of_different_counts_or_equal_numbers_are_refused():
    port = free_port()
    codes, outputs = finish(start(port, 2, 0), start(port, 3, 1))
    assert codes == [75, 75]
    assert all('--num_processes=3, process 0 with 2' in output for output in outputs), outputs
    port = free_port()
    codes, outputs = finish(start(port, 3, 0), start(port, 3, 1), start(port, 3, 1))
    assert codes == [75, 75, 75]
    assert all('two processes were started with --process_id=1' in o for o in outputs), outputs


def test_a_connection_to_itself_is_not_process_0(monkeypatch):
    """The kernel may choose the port itself for a connection to a free port of this machine."""
    port, connect, calls, again = free_port(), socket.create_connection, [], threading.Event()

    def connect_to_itself_first(address, **kwargs):
        calls.append(address)
        if len(calls) == 1:
            return connect(address, source_address=address, **kwargs)
        again.set()
        return connect(address, **kwargs)

    monkeypatch.setattr(socket, 'create_connection', connect_to_itself_first)
    where = f'127.0.0.1:{port}', 2
    with concurrent.futures.ThreadPoolExecutor() as threads:
        second = threads.submit(meet, *where, 1, 20)
        assert again.wait(20)
        first = threads.submit(meet, *where, 0, 20)
        met = first.result() | second.result()
    assert sorted(met.values()) == [0, 1]
    for connection in met:
        connection.close()


def test_a_busy_port_is_named():
    with socket.create_server(('', 0)) as server:
        port = server.getsockname()[1]
        codes, outputs = finish(start(port, 2, 0))
    assert codes == [2]
    assert f'process 0 cannot listen on port {port}' in outputs[0]


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        ({}, False),
        ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, False),
        ({'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_STEP_NUM_TASKS': '4'}, True),
        ({'SLURM_STEP_NODELIST': 'n1', 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_NTASKS': '4'}, False),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
        ({'OMPI_COMM_WORLD_SIZE': '1'}, False),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
        ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
        ({'MEGASCALE_NUM_SLICES': '2'}, True),
        ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, True),
    ],
)
def test_clusters_are_detected_by_their_variables(environment, expected):
    assert processes.is_cluster_detected(environment) is expected


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        (dict(coordinator='a:1'), '--num_processes, --process_id is missing'),
        (dict(coordinator='a:1', num_processes=2, process_id=2), 'expected 0 to 1'),
        (dict(coordinator='a', num_processes=2, process_id=1), "expected 'host:port'"),
    ],
)
def test_an_incomplete_declaration_is_refused(given, expected, monkeypatch):
    monkeypatch.setattr(processes, 'is_cluster_detected', lambda: False)
    with pytest.raises(processes.UserError, match=expected):
        processes.join(processes.Cluster(**given))
