# SPDX-License-Identifier: Apache-2.0
"""launch/processes.py with real processes, real signals and no JAX."""

from __future__ import annotations

import fcntl
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from tests import command

LAUNCHER = command.ROOT / 'launch' / 'processes.py'

# Holds a lock until it ends, and counts the signals that it gets.
PROGRAM = """
import fcntl, os, pathlib, signal, subprocess, sys, time

number = sys.argv[-1].removeprefix('--process_id=')
here = pathlib.Path(sys.argv[1])
got = []


def locked(name):
    lock = open(here / name, 'w')
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def count(number, frame):
    got.append(signal.Signals(number).name)
    print('got', *got, flush=True)


def wait_for(condition):
    while not condition():
        time.sleep(0.01)


signal.signal(signal.SIGTERM, count)
signal.signal(signal.SIGINT, count)
lock = locked(f'lock{number}')
(here / f'ready{number}').touch()
all_ready = lambda: len(list(here.glob('ready*'))) == 2
"""


def start(
    tmp_path: pathlib.Path, program: str, *flags: str, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Starts two processes of this program."""
    path = tmp_path / 'program.py'
    path.write_text(PROGRAM + program)
    started = f"--command='{sys.executable}' '{path}'"
    return subprocess.Popen(
        [sys.executable, LAUNCHER, '-n', '2', started, *flags, '--', str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def run(tmp_path: pathlib.Path, program: str, *flags: str, **kwargs) -> tuple[int, str, str]:
    return finish(start(tmp_path, program, *flags, **kwargs))


def both_ready(tmp_path: pathlib.Path) -> None:
    command.wait_for(lambda: len(list(tmp_path.glob('ready*'))) == 2)


def has_ended(tmp_path: pathlib.Path, name: str) -> bool:
    """Whether the process that held the lock has ended."""
    with open(tmp_path / name) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_output_lines_begin_with_the_process_number(tmp_path: pathlib.Path) -> None:
    code, out, err = run(
        tmp_path, "print('a\\nb'); print('e', file=sys.stderr); print('c', end='')"
    )
    assert code == 0
    for number in (0, 1):
        mine = [line for line in out.splitlines(keepends=True) if line[1] == str(number)]
        assert mine == [f'[{number}] {text}\n' for text in 'abc']
    assert sorted(err.splitlines()) == ['[0] e', '[1] e']


def test_processes_get_coordinator_and_platform(tmp_path: pathlib.Path) -> None:
    flags = '--xla_cpu_x=1 --xla_force_host_platform_device_count=8'
    code, out, _ = run(
        tmp_path,
        "print(*sys.argv[2:], os.environ['JAX_PLATFORMS'], os.environ['XLA_FLAGS'])",
        '--devices_per_process=3',
        env={'XLA_FLAGS': flags},
    )
    assert code == 0
    lines = sorted(out.splitlines())
    port = lines[0].split()[1].rpartition(':')[2]
    assert lines == [
        f'[{i}] --coordinator=127.0.0.1:{port} --num_processes=2 --process_id={i} cpu '
        '--xla_cpu_x=1 --xla_force_host_platform_device_count=3'
        for i in (0, 1)
    ]


@pytest.mark.parametrize(('visible', 'expected'), [(None, '0,1 2,3'), ('4,5,6,7', '4,5 6,7')])
def test_each_process_gets_its_own_gpus(
    visible: str | None, expected: str, tmp_path: pathlib.Path
) -> None:
    env = {'CUDA_VISIBLE_DEVICES': visible or ''}
    program = "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['JAX_PLATFORMS'])"
    flags = ('--platform=cuda', '--devices_per_process=2')
    code, out, _ = run(tmp_path, program, *flags, env=env)
    assert code == 0
    first, second = expected.split()
    assert sorted(out.splitlines()) == [f'[0] {first} cuda', f'[1] {second} cuda']


def test_first_failure_terminates_the_others_and_sets_the_exit_code(tmp_path: pathlib.Path) -> None:
    program = """
wait_for(all_ready)
if number == '1':
    sys.exit(7)
wait_for(lambda: got)
sys.exit(5)
"""
    code, out, err = run(tmp_path, program)
    assert code == 7, err
    assert out == '[0] got SIGTERM\n'
    assert 'process 1: exit code 7; terminating the others' in err


def test_process_that_ignores_sigterm_is_killed(tmp_path: pathlib.Path) -> None:
    program = """
wait_for(all_ready)
if number == '0':
    os.kill(os.getpid(), signal.SIGKILL)
wait_for(lambda: False)
"""
    code, out, err = run(tmp_path, program, '--grace_secs=1')
    assert code == 128 + signal.SIGKILL, err
    assert out == '[1] got SIGTERM\n'
    assert 'process 0: killed by SIGKILL; terminating the others' in err
    assert 'killing 1 still running after 1 s' in err


def test_sigterm_is_forwarded_once_and_is_not_a_failure(tmp_path: pathlib.Path) -> None:
    program = """
wait_for(lambda: got)
wait_for((here / 'leave').exists)
sys.exit(42)
"""
    process = start(tmp_path, program, '--restarts=3')
    both_ready(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGTERM)
    (tmp_path / 'leave').touch()
    code, out, err = finish(process)
    assert sorted(lines) == ['[0] got SIGTERM\n', '[1] got SIGTERM\n']
    # A launcher that was asked to end must not restart the processes.
    assert (code, out, err) == (42, '', '')


def test_ctrl_c_is_forwarded_and_a_second_one_kills(tmp_path: pathlib.Path) -> None:
    process = start(tmp_path, 'wait_for(lambda: False)')
    both_ready(tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    assert sorted(lines) == ['[0] got SIGINT\n', '[1] got SIGINT\n']
    process.send_signal(signal.SIGINT)
    code, out, _ = finish(process)
    assert (code, out) == (130, '')


@pytest.mark.slow
def test_sigusr2_prints_stacks_and_processes_continue(tmp_path: pathlib.Path) -> None:
    program = """
import faulthandler

faulthandler.register(signal.SIGUSR2)
(here / f'listens{number}').touch()
wait_for((here / 'leave').exists)
"""
    process = start(tmp_path, program)
    command.wait_for(lambda: len(list(tmp_path.glob('listens*'))) == 2)
    process.send_signal(signal.SIGUSR2)
    assert process.stderr is not None
    lines = []
    while sum('in wait_for' in line for line in lines) < 2:
        lines.append(process.stderr.readline())
    (tmp_path / 'leave').touch()
    assert finish(process)[0] == 0
    assert {line[:3] for line in lines} == {'[0]', '[1]'}


CHILD = """
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child_lock = locked(f'child{number}')
    (here / f'child_ready{number}').touch()
    wait_for(lambda: False)
wait_for((here / f'child_ready{number}').exists)
"""


def test_killed_launcher_leaves_no_processes(tmp_path: pathlib.Path) -> None:
    process = start(tmp_path, f'{CHILD}\nwait_for(lambda: False)')
    command.wait_for(lambda: len(list(tmp_path.glob('child_ready*'))) == 2)
    locks = ('lock0', 'lock1', 'child0', 'child1')
    assert not any(has_ended(tmp_path, name) for name in locks)
    process.kill()
    finish(process)
    command.wait_for(lambda: all(has_ended(tmp_path, name) for name in locks))


def test_children_of_ended_processes_are_killed(
    tmp_path: pathlib.Path,
) -> None:
    code, _, _ = run(tmp_path, CHILD)
    assert code == 0
    assert has_ended(tmp_path, 'child0') and has_ended(tmp_path, 'child1')


def test_preempted_processes_are_restarted(tmp_path: pathlib.Path) -> None:
    program = """
def runs(number):
    path = here / f'runs{number}'
    return path.read_text() if path.exists() else ''


mine = runs(number) + 'x'
(here / f'runs{number}').write_text(mine)
wait_for(lambda: len(runs(0)) >= len(mine) and len(runs(1)) >= len(mine))
sys.exit(42 if len(mine) < 3 else 0)
"""
    code, _, err = run(tmp_path, program, '--restarts=1')
    assert code == 42
    assert 'preempted and saved: start 2 of 2' in err
    assert run(tmp_path, program, '--restarts=1')[0] == 0
    assert (tmp_path / 'runs0').read_text() == (tmp_path / 'runs1').read_text() == 'xxx'


def test_launcher_ends_if_its_output_is_not_read(tmp_path: pathlib.Path) -> None:
    program = """
wait_for((here / 'closed').exists)
print('x' * 1000000)
print('y' * 1000000)
"""
    process = start(tmp_path, program)
    assert process.stdout is not None
    process.stdout.close()
    (tmp_path / 'closed').touch()
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ([], '-n/--processes'),
        (['-n', '0'], "expected an integer of at least 1, got '0'"),
        (['-n', '2', '--restart=1'], 'unrecognized arguments: --restart=1'),
        (['-n', '2', '--config=a.py'], '--config=a.py'),
        (['-n', '2', '--', '--workdir=a'], 'come after `--`, as in: -- --config='),
        (['-n', '2', '--command=/no/such/program'], "'/no/such/program'"),
        (['-n', '2', '--platform=cuda', '--command=true'], 'need 2, but CUDA_VISIBLE_DEVICES=3'),
    ],
)
def test_invalid_flags_are_rejected(arguments: list[str], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, LAUNCHER, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': '3'},
    )
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('Error: ') and expected in done.stderr
    assert 'Traceback' not in done.stderr


def test_dry_run_prints_valid_commands() -> None:
    arguments = [LAUNCHER, '-n', '2', '--dry_run', '--', '--config=configs/mnist.py']
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert second.endswith('--num_processes=2 --process_id=1')
    shown = subprocess.run(
        ['bash', '-c', f'{first} --mode=config'], capture_output=True, text=True, cwd=command.ROOT
    )
    assert shown.returncode == 0, shown.stderr


@pytest.mark.slow
def test_two_trainer_processes_train_one_run(tmp_path: pathlib.Path) -> None:
    trainer = (command.MLP, *command.SMALL, '--config.train_for=3steps', f'--workdir={tmp_path}')
    process = subprocess.Popen(
        [sys.executable, LAUNCHER, '-n', '2', '--', *trainer],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=command.ROOT,
    )
    [(out, err)] = command.ends(process)
    assert process.returncode == 0, out + err
    assert '[0] ' in out
    assert command.result(tmp_path)['step'] == 3
    assert command.result(tmp_path)['metrics']['eval/test/examples'] == 1000
