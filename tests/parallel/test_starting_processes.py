# SPDX-License-Identifier: Apache-2.0
"""The start of several processes: they agree, or none of them trains."""

from __future__ import annotations

import pathlib
import signal
import socket

import pytest

from tests import command
from tests.parallel import group

SHORT = ('--config.train_for=20steps',)


def assert_refused(workdir: pathlib.Path, expected: str, *args: str, **options: object) -> None:
    codes, outputs, errors = group.finish(group.start(2, workdir, *args, **options))  # type: ignore[arg-type]
    assert codes == [2, 2], errors
    assert outputs == ['', '']
    for error in errors:
        assert expected in error
        assert 'Traceback' not in error
    assert not (workdir / 'metrics.jsonl').exists()


@pytest.mark.slow
def test_another_config_is_named(tmp_path: pathlib.Path) -> None:
    other = {1: '--config.optimizer.learning_rate=0.5'}
    expected = 'process 1:\n  config.optimizer.learning_rate  0.01 -> 0.5\n'
    assert_refused(tmp_path / 'run', expected, *SHORT, only=other)


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['eval', 'dry_run', 'summary'])
def test_another_config_is_named_in_every_mode(mode: str, tmp_path: pathlib.Path) -> None:
    """Evaluations of different batches would wait for each other forever."""
    other = {1: '--config.evals.test.data.batch_size=100'}
    expected = 'process 1:\n  config.evals.test.data.batch_size'
    assert_refused(tmp_path, expected, *SHORT, f'--mode={mode}', only=other)


@pytest.mark.slow
def test_another_mode_is_named(tmp_path: pathlib.Path) -> None:
    expected = "process 1:\n  mode  'train' -> 'eval'\n"
    assert_refused(tmp_path, expected, *SHORT, only={1: '--mode=eval'})


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'expected'),
    [('train.txt', '  data.examples  '), ('test.txt', '  data of evals.test.examples  ')],
)
def test_another_file_of_data_is_named(name: str, expected: str, tmp_path: pathlib.Path) -> None:
    """Different files with the same name, as on two hosts; the configs are equal."""
    hosts = [tmp_path / 'host0', tmp_path / 'host1']
    for host in hosts:
        host.mkdir()
        for file in ('train.txt', 'test.txt'):
            (host / file).write_text('some text to train on. ' * 200)
    (hosts[1] / name).write_text('another text. ' * 100)

    def source(file: str, split: str) -> str:
        node = f'{{"target": "trainer.data.text:Bytes", "path": "{file}", "split": "{split}"'
        return node + ', "seq_len": 16, "holdout": 0.5}'

    config = (
        f'--config={command.ROOT}/configs/lm.py:bytes', '--config.model.layers=1',
        '--config.model.width=16', f'--config.data.source={source("train.txt", "train")}',
        f'--config.evals.test.data.source={source("test.txt", "test")}',
    )  # fmt: skip
    assert_refused(tmp_path / 'run', expected, *SHORT, config=config, cwds=hosts)


@pytest.mark.slow
def test_a_process_that_does_not_start_is_named(tmp_path: pathlib.Path) -> None:
    flags = group.flags(2, group.free_port(), timeout_secs=2)
    workdir = tmp_path / 'run'
    ended = command.run(command.MLP, f'--workdir={workdir}', *flags, '--process_id=0')
    assert ended.code == 75
    assert 'process 1 of 2 did not connect within 2 s (--init_timeout)' in ended.err
    assert 'Traceback' not in ended.err
    assert not workdir.exists()


@pytest.mark.slow
def test_a_sigterm_before_all_processes_have_started(tmp_path: pathlib.Path) -> None:
    port = group.free_port()
    args = (command.MLP, *command.SMALL, f'--workdir={tmp_path}', *group.flags(2, port))
    args = (*args, '--config.train_for=100000steps')
    running = [command.start(*args, '--process_id=0')]
    with group.kill_at_exit(running):
        command.wait_for(lambda: _listens(port))
        running[0].send_signal(signal.SIGTERM)
        command.wait_for(lambda: _listens(port))
        running.append(command.start(*args, '--process_id=1'))
        codes, _, errors = group.finish(running)
    assert codes == [42, 42], errors
    assert command.result(tmp_path)['status'] == 'preempted'


@pytest.mark.slow
def test_a_dry_run_of_two_processes(tmp_path: pathlib.Path) -> None:
    """Both write their shards to one temporary directory, which is deleted afterwards."""
    mesh = ('--config.mesh={"data": 1, "fsdp": -1}', '--config.sharding=fsdp')
    outputs = group.train(2, tmp_path / 'run', *SHORT, '--mode=dry_run', *mesh)
    assert 'checkpoint OK (' in outputs[0]
    assert outputs[1] == ''
    assert list(tmp_path.iterdir()) == []


def _listens(port: int) -> bool:
    try:
        socket.create_connection(('127.0.0.1', port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_a_directory_that_is_not_shared_is_refused(tmp_path: pathlib.Path) -> None:
    """The same path, but relative to two places: as on two disks."""
    places = [tmp_path / 'one', tmp_path / 'two']
    for place in places:
        place.mkdir()
        (place / 'run').mkdir()
    config = (f'--config={command.ROOT}/configs/mnist_mlp.py', *command.SMALL)
    running = group.start(2, pathlib.Path('run'), config=config, cwds=places)
    outputs = command.ends(*running)
    for process, (_, err) in zip(running, outputs, strict=True):
        assert process.returncode == 2, err
        assert 'run is not shared: process 0 on ' in err
        assert 'does not see a file that process 1 on ' in err
    assert not list(tmp_path.glob('*/run/checkpoints'))
