# SPDX-License-Identifier: Apache-2.0
"""Runs that hang: they end with the stacks of their threads, and a stop saves what it can."""

from __future__ import annotations

import itertools
import pathlib
import re
import signal
import subprocess
import time

import pytest

from tests import command
from tests.parallel import group
from trainer.parallel.peer_watch import Silence
from trainer.run import watchdog

HANGS = """
import pathlib, time
from trainer.data.mnist import MNIST

class Hangs(MNIST):
    def gather(self, indices):
        here = pathlib.Path(__file__).parent
        if 777 in indices and (here / 'hangs').exists():
            (here / 'hanging').touch()
            time.sleep(3600)
        return super().gather(indices)

def hook(event):
    if event.kind == 'log' and event.step == 20:
        time.sleep(3600)
"""
SOURCE = '--config.data.source.target=hanging:Hangs'
# Example 777 comes after some steps: the order is shuffled.
LENGTH = ('--config.train_for=200steps', '--config.evals={}', '--config.log.every=10steps')


@pytest.fixture
def place(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / 'hanging.py').write_text(HANGS)
    (tmp_path / 'hangs').touch()
    return tmp_path


def start(place: pathlib.Path, *args: str, name: str = 'run') -> subprocess.Popen[str]:
    config = f'--config={command.ROOT}/configs/mnist_mlp.py'
    small = (*command.SMALL, f'--workdir={place}/{name}', *LENGTH)
    return command.start(config, *small, *args, cwd=place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('args', 'where', 'key', 'function'),
    [
        ((SOURCE, '--config.watchdog.step_secs=3'), 'waiting for data', 'step_secs', 'in gather'),
        (
            ('--config.hooks={"h":{"ref":"hanging:hook"}}', '--config.watchdog.hook_secs=3'),
            *('in a hook', 'hook_secs', 'in hook'),
        ),
    ],
)
def test_a_run_that_hangs_ends_with_its_stacks(
    place: pathlib.Path, args: tuple[str, ...], where: str, key: str, function: str
) -> None:
    process = start(place, *args)
    [(_, err)] = command.ends(process, secs=120)
    assert process.returncode == 76, err
    assert re.search(rf'^Error: no progress for \d+ s: {where} after step \d+\. The stacks', err)
    assert f'The limit is config.watchdog.{key}.' in err
    log = (place / 'run' / 'log.txt').read_text()
    for text in (err, log):
        assert 'hanging.py' in text and function in text
    result = command.result(place / 'run')
    assert result['status'] == 'failed'
    assert result['error']['message'].startswith('no progress for ')


@pytest.mark.slow
@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_a_stop_saves_although_the_data_hangs(
    place: pathlib.Path, number: signal.Signals, code: int
) -> None:
    process = start(place, SOURCE)
    command.wait_for((place / 'hanging').exists)
    process.send_signal(number)
    began = time.monotonic()
    [(out, err)] = command.ends(process, secs=60)
    assert process.returncode == code, err
    assert time.monotonic() - began < 40
    result = command.result(place / 'run')
    assert result['status'] == {42: 'preempted', 130: 'interrupted'}[code]
    step = result['step']
    assert f'Saved step {step:,} before exiting.' in out
    assert (place / 'run' / 'checkpoints' / str(step) / 'commit_success.txt').exists()
    (place / 'hangs').unlink()
    for name in ('run', 'whole'):
        process = start(place, SOURCE, name=name)
        [(out, err)] = command.ends(process)
        assert process.returncode == 0, err
        assert (f'resuming from step {step}' in out) == (name == 'run')
    command.assert_same_run(place / 'run', place / 'whole')


def test_a_paused_process_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.chain([1, 2, 3, 1000, 1001], [1002, 1004, 1006, 1007])
    monkeypatch.setattr(time, 'monotonic', clock.__next__)
    idle = watchdog._Idle()
    for seen, secs in [('a', 0), ('a', 1), ('a', 2), ('a', 7), ('b', 0)]:
        idle.update((seen,), in_steps=True)
        assert idle.secs == secs
    assert not idle.longest  # What came before the change was another part of the run.
    for step in (1, 1, 2, 3):
        idle.update(('b', step), in_steps=True)
    assert idle.longest == 4


HANGS_IN_ONE = """
import time
import jax
from trainer.data.mnist import MNIST

class Hangs(MNIST):
    calls = 0

    def gather(self, indices):
        if jax.process_index() == 1 and self.calls > 5:
            time.sleep(3600)
        self.calls += 1
        return super().gather(indices)
"""


@pytest.mark.slow
def test_all_processes_end_if_one_hangs(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'hanging.py').write_text(HANGS_IN_ONE)
    config = (f'--config={command.ROOT}/configs/mnist_mlp.py', *command.SMALL, *LENGTH)
    running = group.start(
        *(2, tmp_path / 'run', SOURCE, '--config.watchdog.step_secs=3'),
        config=config,
        cwds=[tmp_path, tmp_path],
    )
    codes, _, errors = group.finish(running)
    assert codes == [76, 76], errors
    for number, err in enumerate(errors):
        assert 'The stacks of all threads' in err and 'Thread 0x' in err
        log = 'log.1.txt' if number else 'log.txt'
        assert 'Thread 0x' in (tmp_path / 'run' / log).read_text()
    # Whichever notices first: process 1 waits for its data, and process 0 for process 1.
    assert any('no progress for ' in err for err in errors)


@pytest.mark.slow
def test_a_stopped_process_ends_the_others(tmp_path: pathlib.Path) -> None:
    """JAX would abort them from C++ without a message."""
    length = ('--config.train_for=500000steps', *LENGTH[1:], '--heartbeat_timeout=40')
    running = group.start(2, tmp_path, *length)
    with group.kill_at_exit(running):
        command.wait_for(command.rows_written(tmp_path, 2))
        running[1].send_signal(signal.SIGSTOP)
        _, err = running[0].communicate(timeout=90)
    assert running[0].returncode == 75, err
    assert 'process 1 of 2 has not responded for 12 s' in err


def test_silence_counts_only_while_this_process_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.chain([1, 5, 6, 1000, 1001], [1008, 1012, 1013])
    monkeypatch.setattr(time, 'monotonic', clock.__next__)
    silence = Silence([1, 2], limit=12)
    found = [silence.find() for _ in range(4)]
    silence.hear(2)
    found += [silence.find() for _ in range(3)]
    silence.forget(1)
    assert found == [*[None] * 6, 1]
    assert silence.find() is None
