# SPDX-License-Identifier: Apache-2.0
"""SIGUSR1 saves and continues, in one process and in several."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import threading
import time
from typing import Any

import pytest

from tests import command
from trainer.parallel import save_request
from trainer.parallel.save_request import SaveRequest

LONG = (
    '--config.train_for=200000steps',
    '--config.checkpoint.every=never',
    '--config.evals={}',
    '--config.log.every=20steps',
)


class Store:
    """The key-value store of several processes, as JAX's client offers it."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self._changed:
            assert allow_overwrite or key not in self._values
            self._values[key] = value
            self._changed.notify_all()

    def key_value_try_get(self, key: str) -> str:
        with self._changed:
            return self._values[key]

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, timeout_ms / 1000)
            return self._values[key]


def test_one_process_saves_at_the_next_poll(capfd: pytest.CaptureFixture[str]) -> None:
    request = SaveRequest()
    assert not request.poll(1)
    request.handle(signal.SIGUSR1, None)
    assert request.poll(2)
    assert not request.poll(3)
    assert capfd.readouterr().err == '\nSIGUSR1: saving after this step, and continuing.\n'


@pytest.mark.parametrize('asked', [[0], [2], [0, 1, 2]])
def test_processes_save_after_the_same_step(
    asked: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also those that are ahead, in calls of three steps each."""
    monkeypatch.setattr(save_request, '_POLL_SECS', 0.01)
    store, saved = Store(), [[] for _ in range(3)]  # type: list[list[int]]

    def train(number: int) -> None:
        request = SaveRequest()
        request.share(store, number, 3)
        for step in range(3, 1000, 3):
            if number in asked and step in (30, 600):
                request.handle(signal.SIGUSR1, None)
            if request.poll(step):
                saved[number].append(step)
            time.sleep(0.0003 * (1 + number))

    threads = [threading.Thread(target=train, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert saved[0] == saved[1] == saved[2]
    assert 1 <= len(saved[0]) <= 2 * len(asked) and saved[0][0] > 30


def committed_steps(workdir: pathlib.Path) -> list[int]:
    found = (workdir / 'checkpoints').glob('*/commit_success.txt')
    return sorted(int(path.parent.name) for path in found)


@pytest.mark.slow
def test_a_run_saves_and_continues(tmp_path: pathlib.Path) -> None:
    process = command.start(command.MLP, *command.SMALL, f'--workdir={tmp_path}', *LONG)
    try:
        for count in (1, 2):
            command.wait_for(command.rows_written(tmp_path, 2 * count))
            process.send_signal(signal.SIGUSR1)
            command.wait_for(lambda: len(committed_steps(tmp_path)) == count)  # noqa: B023
        process.send_signal(signal.SIGTERM)
        [(_, err)] = command.ends(process)
    finally:
        process.kill()
    assert process.returncode == 42
    assert err.count('SIGUSR1: saving after this step, and continuing.') == 2
    assert command.result(tmp_path)['step'] > committed_steps(tmp_path)[0]


@pytest.mark.slow
def test_two_processes_save_when_one_is_asked(tmp_path: pathlib.Path) -> None:
    launcher = subprocess.Popen(
        [
            *('launch/processes.py', '-n', '2', '--', command.MLP, *command.SMALL, *LONG),
            f'--workdir={tmp_path}',
        ],
        cwd=command.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        command.wait_for(command.rows_written(tmp_path, 2))
        found = subprocess.run(
            ['pgrep', '-f', f'process_id=1.*workdir={tmp_path}|workdir={tmp_path}.*process_id=1'],
            capture_output=True,
            text=True,
        )
        [last] = found.stdout.split()
        subprocess.run(['kill', '-USR1', last], check=True)
        command.wait_for(lambda: len(committed_steps(tmp_path)) == 1)
        launcher.send_signal(signal.SIGTERM)
        out: Any = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == 42, out
    assert command.result(tmp_path)['step'] > committed_steps(tmp_path)[0]


@pytest.mark.slow
def test_other_modes_ignore_it(tmp_path: pathlib.Path) -> None:
    command.train(tmp_path, '--config.train_for=20steps')
    process = command.start(command.MLP, *command.SMALL, f'--workdir={tmp_path}', '--mode=eval')
    time.sleep(1)
    process.send_signal(signal.SIGUSR1)
    command.ends(process)
    assert process.returncode == 0
