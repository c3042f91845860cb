# SPDX-License-Identifier: Apache-2.0
"""Runs of several processes: one data order, one state, one set of files."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import signal
import time
from typing import Any

import pytest

from tests import command
from tests.parallel.group import finish, kill_at_exit, start, train

SHORT = (
    '--config.train_for=60steps',
    '--config.log.every=20steps',
    '--config.checkpoint.every=30steps',
    '--config.model.dropout_rate=0.1',
    '--config.model.batch_norm=true',
)


@pytest.fixture(scope='module')
def two_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list[str]]:
    """Two processes of two devices."""
    workdir = tmp_path_factory.mktemp('two') / 'run'
    return workdir, train(2, workdir, *SHORT, devices=2)


@pytest.fixture(scope='module')
def one_by_four(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One process of four devices."""
    workdir = tmp_path_factory.mktemp('one') / 'run'
    train(1, workdir, *SHORT, devices=4)
    return workdir


def assert_close(one: pathlib.Path, other: pathlib.Path) -> None:
    """Asserts that rows are equal up to rounding."""
    mine, its = command.rows(one), command.rows(other)
    assert [row['step'] for row in mine] == [row['step'] for row in its]
    for a, b in zip(mine, its, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=1e-6), name


@pytest.mark.slow
def test_only_the_main_process_writes(two_by_two: tuple[pathlib.Path, list[str]]) -> None:
    workdir, outputs = two_by_two
    assert 'finished at step 60' in outputs[0]
    assert 'Gloo' not in outputs[0]
    assert outputs[1] == ''
    steps = [row['step'] for row in command.rows(workdir) if 'train/loss' in row]
    assert steps == [20, 40, 60]
    assert len(list(workdir.glob('events.*'))) == 1
    names = {path.name for path in workdir.iterdir()}
    assert {'log.txt', 'log.1.txt', 'debug.log', 'debug.1.log'} <= names
    for name in ('log.txt', 'log.1.txt'):
        assert 'finished at step 60' in (workdir / name).read_text()
    devices = json.loads((workdir / 'run.json').read_text())['devices']
    assert (devices['count'], devices['processes']) == (4, 2)


@pytest.mark.slow
def test_the_data_order_is_that_of_one_process(
    two_by_two: tuple[pathlib.Path, list[str]], one_by_four: pathlib.Path
) -> None:
    workdir, _ = two_by_two
    assert command.result(workdir)['data_digest'] == command.result(one_by_four)['data_digest']
    assert_close(workdir, one_by_four)


@pytest.mark.slow
def test_four_processes_equal_two_bit_for_bit(
    two_by_two: tuple[pathlib.Path, list[str]], tmp_path: pathlib.Path
) -> None:
    """And a rerun equals the first run."""
    workdir, _ = two_by_two
    train(4, tmp_path / 'four', *SHORT)
    train(2, tmp_path / 'again', *SHORT, devices=2)
    expected = command.result(workdir)
    for name in ('four', 'again'):
        found = command.result(tmp_path / name)
        assert found['data_digest'] == expected['data_digest']
        assert found['digest'] == expected['digest']
        assert command.rows(tmp_path / name) == command.rows(workdir)


@pytest.fixture(scope='module')
def half(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two processes of two devices, half as many steps."""
    workdir = tmp_path_factory.mktemp('half') / 'run'
    train(2, workdir, *SHORT, '--config.train_for=30steps', devices=2)
    assert command.result(workdir)['step'] == 30
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'devices'), [(1, 4), (4, 1)])
def test_a_checkpoint_of_two_processes_is_resumed_by_any_number(
    two_by_two: tuple[pathlib.Path, list[str]],
    half: pathlib.Path,
    count: int,
    devices: int,
    tmp_path: pathlib.Path,
) -> None:
    """The digest of the restored state is checked; four processes then equal two bit for bit."""
    whole, _ = two_by_two
    first = tmp_path / 'run'
    shutil.copytree(half, first)
    train(count, first, *SHORT, devices=devices)
    assert command.result(first)['data_digest'] == command.result(whole)['data_digest']
    # The shorter run evaluated at its end, too.
    last = command.rows(first)[-1], command.rows(whole)[-1]
    assert last[0] == pytest.approx(last[1], rel=1e-4)
    if count == 4:
        assert command.result(first)['digest'] == command.result(whole)['digest']


LAST = 600
LONG = (*SHORT[1:], f'--config.train_for={LAST}steps', '--config.checkpoint.every=50steps')


@pytest.fixture(scope='module')
def long_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An uninterrupted run of two processes."""
    workdir = tmp_path_factory.mktemp('long') / 'run'
    train(2, workdir, *LONG)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, 1])
def test_sigterm_to_one_process_stops_all_at_the_same_step(
    number: int, long_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    running = start(2, tmp_path, *LONG)
    with kill_at_exit(running):
        command.wait_for(command.rows_written(tmp_path, at_least=3), secs=120)
        running[number].send_signal(signal.SIGTERM)
        codes, _, errors = finish(running)
    assert codes == [42, 42], errors
    step = command.result(tmp_path)['step']
    assert command.result(tmp_path)['status'] == 'preempted'
    assert 60 <= step < LAST
    assert str(step) in {path.name for path in (tmp_path / 'checkpoints').iterdir()}
    train(2, tmp_path, *LONG)
    for name in ('digest', 'data_digest'):
        assert command.result(tmp_path)[name] == command.result(long_run)[name]
    assert command.rows(tmp_path) == command.rows(long_run)


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, 1])
def test_a_killed_process_ends_the_others(
    number: int, long_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    running = start(2, tmp_path, *LONG, '--heartbeat_timeout=10')
    with kill_at_exit(running):
        command.wait_for(command.rows_written(tmp_path, at_least=3), secs=120)
        running[number].kill()
        began = time.monotonic()
        codes, _, errors = finish(running)
    assert time.monotonic() - began < 60
    assert codes[number] == -signal.SIGKILL
    assert codes[1 - number] == 75, errors
    assert f'process {number} of 2 has ended unexpectedly' in errors[1 - number]
    assert 'Traceback' not in errors[1 - number]
    if number == 1:  # Else the process that writes is the one that was killed.
        result = command.result(tmp_path)
        assert result['status'] == 'failed'
        assert 'process 1 of 2 has ended unexpectedly' in result['error']['message']
        assert json.loads((tmp_path / 'run.json').read_text())['status'] == 'failed'
    train(2, tmp_path, *LONG)
    for name in ('digest', 'data_digest'):
        assert command.result(tmp_path)[name] == command.result(long_run)[name]


def split(examples: int) -> dict[str, Any]:
    source = {'target': 'trainer.data.mnist:MNIST', 'split': 'test', 'limit': examples}
    return {'data': {'source': source, 'batch_size': 510}}


@pytest.mark.slow
def test_uneven_evaluations_are_exact(long_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """4,097 examples, and fewer examples than processes."""
    evals = {'many': split(4097), 'few': split(2)}
    found = []
    for count in (1, 2, 3):
        workdir = tmp_path / str(count)
        shutil.copytree(long_run, workdir)
        config = (command.MLP, command.SMALL[0], f'--config.evals={json.dumps(evals)}')
        running = start(count, workdir, *LONG, '--mode=eval', config=config)
        codes, outputs, errors = finish(running)
        assert codes == [0] * count, errors
        assert outputs[1:] == [''] * (count - 1)
        lines = re.findall(r'eval (\w+): loss (\S+)  accuracy (\S+)  examples (\d+)', outputs[0])
        found.append({line[0]: tuple(map(float, line[1:])) for line in lines})
    for name, examples in {'many': 4097, 'few': 2}.items():
        loss, accuracy, count = zip(*(values[name] for values in found), strict=True)
        assert set(count) == {examples}
        assert len(set(accuracy)) == 1
        assert loss == pytest.approx([loss[0]] * 3, rel=1e-5)


@pytest.mark.slow
def test_the_state_of_each_process_is_in_one_checkpoint(
    two_by_two: tuple[pathlib.Path, list[str]],
) -> None:
    """All processes take part in a save; one process restores it, without flags."""
    workdir, _ = two_by_two
    finished = command.run(
        command.MLP, *command.SMALL, *SHORT, f'--workdir={workdir}', '--mode=eval'
    )
    assert finished.code == 0, finished.err
    accuracy = json.loads((workdir / 'result.json').read_text())['metrics']['eval/test/accuracy']
    assert f'accuracy {accuracy:.6g}' in finished.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ('mesh', 'rule'),
    [
        ('{"data": 1, "fsdp": 4}', '{"target": "trainer.sharding:FSDP", "min_bytes": 0}'),
        # All processes need all rows of a batch, and each row counts once in the digest.
        ('{"data": 1, "model": 4}', """{"target": "trainer.sharding:ByPath",
            "rules": [["Dense_0/kernel", [null, "model"]], ["Dense_1/kernel", ["model"]]]}"""),
    ],
    ids=['fsdp', 'model'],
)  # fmt: skip
def test_a_state_sharded_over_processes(mesh: str, rule: str, tmp_path: pathlib.Path) -> None:
    """Each process saves its shards; one process resumes with all of them, and losses agree."""
    options = (f'--config.mesh={mesh}', f'--config.sharding=[{rule}]', '--config.steps_per_call=5')
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    train(1, whole, *SHORT, *options, devices=4)
    outputs = train(2, parts, *SHORT, *options, '--config.train_for=30steps', devices=2)
    assert 'per device' in outputs[0]
    train(1, parts, *SHORT, *options, devices=4)
    assert command.result(parts)['data_digest'] == command.result(whole)['data_digest']
    last = command.rows(parts)[-1], command.rows(whole)[-1]
    assert last[0] == pytest.approx(last[1], rel=1e-4)


@pytest.mark.slow
def test_a_line_search_uses_the_batch_of_all_processes(tmp_path: pathlib.Path) -> None:
    """It takes the same steps as in one process with the same examples."""
    options = (
        '--config.optimizer={"target": "optax:lbfgs", "learning_rate": null}',
        '--config.train_for=4steps',
        '--config.log.every=1steps',
        '--config.checkpoint.every=never',
    )
    train(2, tmp_path / 'two', *options)
    train(1, tmp_path / 'one', *options, devices=2)
    mine, its = (
        [row for row in command.rows(tmp_path / name) if 'train/loss' in row]
        for name in ('two', 'one')
    )
    assert [row['step'] for row in mine] == [row['step'] for row in its] == [1, 2, 3, 4]
    for a, b in zip(mine, its, strict=True):
        for name in ('train/loss', 'train/learning_rate', 'train/update_norm'):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
