# SPDX-License-Identifier: Apache-2.0
"""launch/tpu_pod.py with real shells for the workers and a fake gcloud."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests import command
from tests.launch.fake_gcloud import LAUNCHER, MAKE, TRAINER, Cloud


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Cloud:
    return Cloud(tmp_path)


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (
            ['create', '--accelerator_type=v4-16', '--version=v2'],
            'tpu-vm create pod --accelerator-type=v4-16 --version=v2 --zone=z',
        ),
        (
            ['create', *MAKE, '--project=p'],
            'tpu-vm create pod --accelerator-type=v4-16 --version=v2 --spot --zone=z --project=p',
        ),
        (
            ['create', *MAKE, '--queued'],
            'queued-resources create pod --accelerator-type=v4-16 --runtime-version=v2 '
            '--node-id=pod --spot --zone=z',
        ),
        (['delete'], 'tpu-vm delete pod --quiet --zone=z'),
        (['delete', '--queued'], 'queued-resources delete pod --quiet --force --zone=z'),
        (
            ['logs', '--worker=1', '--lines=5', '--follow'],
            "tpu-vm ssh pod --worker=1 '--command=tail -n 5 -F ~/train/log' --zone=z",
        ),
        (
            ['stop'],
            'tpu-vm ssh pod --worker=all '
            '\'--command=kill -TERM -- "-$(cat ~/train/pid)"\' --zone=z',
        ),
    ],
)
def test_gcloud_commands(arguments: list[str], expected: str, cloud: Cloud) -> None:
    done = cloud.run(*arguments, '--dry_run')
    assert done.stdout == f'gcloud compute tpus {expected}\n'
    assert cloud.calls() == []


def test_dry_run_of_train_prints_all_stages(cloud: Cloud) -> None:
    done = cloud.train('--dry_run')
    assert done.returncode == 0
    starts = ('gcloud compute tpus tpu-vm ', 'git ')
    lines = [line for line in done.stdout.splitlines() if line.startswith(starts)]
    steps = [line.split()[4 if line.startswith('gcloud') else 3] for line in lines]
    assert steps == ['create', 'archive', 'scp', 'ssh', 'ssh', 'ssh', 'ssh', 'ssh']
    assert cloud.calls() == []


@pytest.mark.slow
def test_all_workers_run_the_last_commit(cloud: Cloud) -> None:
    (cloud.source / 'trainer' / 'main.py').write_text('not committed')
    done = cloud.train()
    assert done.returncode == 0, done.stderr
    assert 'Warning: 1 uncommitted changes are not copied' in done.stderr
    assert cloud.verbs() == ['create', 'scp', 'ssh', 'ssh', 'ssh', 'ssh', 'ssh']
    for worker in (0, 1):
        assert cloud.log(worker) == (
            'trainer --config=a b.py --workdir=gs://bucket/run --coordinator=10.0.0.1:8476 '
            f'--num_processes=2 --process_id={worker}\n'
        )
        home = cloud.root / f'home{worker}'
        installs = (home / 'python3').read_text().splitlines()
        assert installs[1] == f'-m uv venv --quiet --clear --python 3.12 {home}/train/venv'
        assert installs[2].endswith(f'--require-hashes -r {home}/train/code/requirements.lock')
        assert installs[3].endswith(f'-e {home}/train/code[tpu]')
    assert cloud.run('logs').stdout == cloud.log(0)


@pytest.mark.slow
def test_workers_restart_after_42_up_to_the_maximum(cloud: Cloud) -> None:
    cloud.will_exit(42, 42, 5)
    done = cloud.train('--restarts=2')
    assert done.returncode == 5
    for worker in (0, 1):
        assert cloud.log(worker).count('trainer --config') == 3
        assert 'preempted and saved after start 2 of 3' in cloud.log(worker)
    assert cloud.verbs().count('create') == 1


@pytest.mark.slow
def test_run_that_ended_with_42_is_restarted(cloud: Cloud) -> None:
    cloud.will_exit(0, 0)
    # Unpacking, installing and starting succeed; the first wait returns 42.
    cloud.will_fail('ssh', '-', '-', '-', '42')
    done = cloud.train('--restarts=1')
    assert done.returncode == 0, done.stderr
    assert 'start 2 of 2' in done.stderr
    assert cloud.log(0).count('trainer --config') == 2
    cloud.will_exit(0, 0, 42)
    assert cloud.train('--restarts=0').returncode == 42
    assert cloud.run('wait').returncode == 42


@pytest.mark.slow
def test_preempted_tpu_is_recreated(cloud: Cloud) -> None:
    cloud.will_exit(0, 0)
    assert cloud.train().returncode == 0
    # The connection to a READY TPU breaks once; then the TPU is preempted.
    cloud.will_fail('ssh', '1', '255 PREEMPTED')
    (cloud.root / 'calls').unlink()
    done = cloud.train()
    assert done.returncode == 0, done.stderr
    assert 'pod is PREEMPTED: recreating it' in done.stderr
    assert cloud.verbs() == [
        'ssh', 'scp', 'ssh', 'delete', 'create', 'scp', 'ssh', 'ssh', 'ssh', 'ssh', 'ssh',
    ]  # fmt: skip


@pytest.mark.slow
def test_broken_connection_is_restored(cloud: Cloud) -> None:
    done = cloud.train()
    assert done.returncode == 0
    for broken in (['255'], ['-', '255']):  # To worker 0, and to all of them after its end.
        cloud.will_fail('ssh', *broken)
        (cloud.root / 'calls').unlink()
        assert cloud.run('wait', '--poll_secs=0.01').returncode == 0
        assert cloud.verbs() == ['ssh', 'ssh', 'ssh']


@pytest.mark.slow
def test_queued_request_is_awaited(cloud: Cloud) -> None:
    done = cloud.train('--queued')
    assert done.returncode == 0, done.stderr
    assert cloud.calls()[1][2:4] == ['queued-resources', 'create']


@pytest.mark.slow
def test_failed_stage_is_reported_and_ends_the_command(cloud: Cloud) -> None:
    cloud.will_fail('scp', '3')
    done = cloud.train()
    assert done.returncode == 3
    assert 'Error: exit code 3 of: gcloud compute tpus tpu-vm scp ' in done.stderr
    assert cloud.verbs() == ['create', 'scp']
    # The next call completes the failed stage.
    assert cloud.train().returncode == 0


@pytest.mark.slow
def test_second_run_is_rejected_and_stop_ends_the_first(cloud: Cloud) -> None:
    cloud.will_exit('late', 'wait')
    assert cloud.train().returncode == 0
    assert cloud.run('run', *TRAINER).returncode == 0
    command.wait_for(lambda: (cloud.root / 'starts1').read_text() == '2')
    second = cloud.run('run', *TRAINER)
    assert second.returncode == 1
    assert 'a run is already in progress' in second.stderr
    assert cloud.run('stop').returncode == 0
    done = cloud.run('wait')
    assert done.returncode == 1
    assert 'the run was stopped' in done.stderr


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['fly'], "invalid choice: 'fly'"),
        (['create'], '--accelerator_type, --version'),
        (['run'], 'come after `--`'),
        (['run', '--', '--config=a', '--workdir=/home/a'], 'add -- --workdir=gs://bucket/'),
        (['copy', '--', '--config=a'], 'copy does not start the trainer'),
    ],
)
def test_invalid_flags_are_rejected(arguments: list[str], expected: str, cloud: Cloud) -> None:
    done = cloud.run(*arguments)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('Error: ') and expected in done.stderr
    assert cloud.calls() == []


def test_missing_gcloud_is_reported(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, LAUNCHER, 'delete', 'pod', '--zone=z'],
        capture_output=True,
        text=True,
        env={**os.environ, 'PATH': str(tmp_path)},
    )
    assert done.returncode == 2
    assert 'no gcloud on the PATH' in done.stderr
