# SPDX-License-Identifier: Apache-2.0
"""launch/slurm.py: the text of the script, and jobs in a private Slurm cluster if available."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests import command
from tests.launch import slurm_cluster
from tests.launch.slurm_cluster import Slurm, launch

CONFIG = '--config=configs/mnist.py'


def directives(text: str) -> list[str]:
    return re.findall(r'^#SBATCH (.*)$', text, flags=re.MULTILINE)


def test_script_has_the_requested_directives(tmp_path: pathlib.Path) -> None:
    done = launch(
        '--nodes=4', '--gpus_per_node=8', '--cpus_per_task=6', '--time=2-00:00:00',
        '--partition=gpu', '--account=lab', '--name=a', '--save_secs=300', '--chdir=/a b',
        '--output=%x.log', '--setup=module load cuda', '--setup=ulimit -n 4096', '--sbatch=--mem=0',
        '--python=python3', '--', '--config=a b.py', '--workdir=gs://bucket/a',
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, '')
    assert directives(done.stdout) == [
        '--job-name=a', '--nodes=4', '--ntasks-per-node=8', '--gpus-per-node=8',
        '--cpus-per-task=6', '--time=2-00:00:00', '--partition=gpu', '--account=lab',
        '--signal=TERM@300', '--requeue', '--open-mode=append', "--chdir='/a b'",
        '--output=%x.log', '--mem=0',
    ]  # fmt: skip
    body = done.stdout.splitlines()
    srun = body.index(
        'srun --kill-on-bad-exit=0 --wait=300 --cpus-per-task=6 '
        "python3 -m trainer.main '--config=a b.py' --workdir=gs://bucket/a"
    )
    assert body[srun - 2 : srun] == ['module load cuda', 'ulimit -n 4096']
    (tmp_path / 'script').write_text(done.stdout)
    subprocess.run(['bash', '-n', tmp_path / 'script'], check=True)


# Replace Slurm's commands, and record their calls.
TOOLS = {
    'srun': 'exit $CODE',
    'squeue': 'echo $STATE',
    'scontrol': 'echo "$@" >> calls',
}


@pytest.mark.parametrize(
    ('code', 'state', 'requeued'),
    [
        (42, 'RUNNING', True),
        (42, 'COMPLETING', False),
        (0, 'RUNNING', False),
        (1, 'RUNNING', False),
    ],
)
def test_only_a_saved_run_of_a_running_job_is_requeued(
    code: int, state: str, requeued: bool, tmp_path: pathlib.Path
) -> None:
    for name, body in TOOLS.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path / name).chmod(0o755)
    env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'CODE': str(code), 'STATE': state}
    done = subprocess.run(
        ['bash', '-c', launch('--', CONFIG).stdout],
        cwd=tmp_path,
        env={**os.environ, **env, 'SLURM_JOB_ID': '7'},
    )
    assert done.returncode == code
    calls = tmp_path / 'calls'
    assert (calls.read_text() if calls.exists() else '') == ('requeue 7\n' if requeued else '')


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ([], 'come after `--`'),
        (['--time=soon', '--', CONFIG], '--time=soon: expected minutes'),
        (
            ['--time=3', '--', CONFIG],
            '--time=3 is 180 s: expected more than --save_secs=120 and a minute',
        ),
        (['--time=2:30', '--', CONFIG], '--time=2:30 is 150 s'),
        (['--gpus_per_node=8', '--tasks_per_node=2', '--', CONFIG], 'one task runs on each GPU'),
        (['--sbatch=mem=0', '--', CONFIG], '--sbatch=mem=0: expected an option of sbatch'),
        (['--nodes=2', '--', CONFIG, '--workdir=/tmp/a'], 'work directory /tmp/a is local to each'),
        (['--nodes=2', '--chdir=/tmp', '--', CONFIG], 'work directory /tmp/runs is local to each'),
        (['--submit', '--', CONFIG], 'no sbatch on the PATH'),
    ],
)
def test_invalid_flags_are_rejected(
    arguments: list[str], expected: str, tmp_path: pathlib.Path
) -> None:
    done = launch(*arguments, env={'PATH': str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('Error: ') and expected in done.stderr


@pytest.mark.parametrize('time', ['4', '3:30', '1:00:00', '1-0', '1-0:30', '0-01:00:00'])
def test_all_forms_of_time_limits_are_accepted(time: str) -> None:
    assert f'--time={time}' in directives(launch(f'--time={time}', '--', CONFIG).stdout)


def test_home_directory_is_expanded_in_paths(tmp_path: pathlib.Path) -> None:
    """The script quotes its paths; arguments of the trainer are not expanded."""
    done = launch(
        '--chdir=~/a b', '--output=~/x.log', '--python=~/venv/bin/python', '--', CONFIG,
        '--workdir=~/run', env={'HOME': str(tmp_path)},
    )  # fmt: skip
    assert {f"--chdir='{tmp_path}/a b'", f'--output={tmp_path}/x.log'} <= set(
        directives(done.stdout)
    )
    assert f'{tmp_path}/venv/bin/python -m trainer.main' in done.stdout
    assert "'--workdir=~/run'" in done.stdout


def test_dry_run_submits_nothing(tmp_path: pathlib.Path) -> None:
    done = launch('--submit', '--dry_run', '--', CONFIG, env={'PATH': str(tmp_path)})
    assert done.returncode == 0
    assert done.stdout == f"sbatch << 'END'\n{launch('--', CONFIG).stdout}END\n"


needs_slurm = pytest.mark.skipif(
    bool(slurm_cluster.MISSING),
    reason='needs the packages slurmctld, slurmd, slurm-client and munge (of Debian); missing: '
    f'{", ".join(slurm_cluster.MISSING)}',
)


@pytest.fixture(scope='module')
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    root = tmp_path_factory.mktemp('slurm')
    with Slurm(root).running() as running:
        yield running


FAKE = """
import os, pathlib, signal, sys, time
if os.environ.get('SLURM_RESTART_COUNT', '0') != '0':
    sys.exit(0)
if 'fail' in sys.argv:
    sys.exit(3)
got = []
signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
pathlib.Path(f'ready{os.environ["SLURM_PROCID"]}').touch()
while not got:
    time.sleep(0.01)
# One task takes longer to save than the other.
time.sleep(2 * int(os.environ['SLURM_PROCID']))
print('saved', os.environ['SLURM_PROCID'], flush=True)
sys.exit(42)
"""


@pytest.fixture
def place(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with a trainer that only waits for a signal."""
    (tmp_path / 'trainer').mkdir()
    (tmp_path / 'trainer' / '__init__.py').write_text('')
    (tmp_path / 'trainer' / 'main.py').write_text(FAKE)
    return tmp_path


def both_ready(place: pathlib.Path) -> None:
    command.wait_for(lambda: len(list(place.glob('ready*'))) == 2)


@needs_slurm
@pytest.mark.slow
def test_job_that_gets_sigterm_saves_and_resumes(slurm: Slurm, place: pathlib.Path) -> None:
    job = slurm.submit(place, '--', CONFIG)
    both_ready(place)
    slurm.ask('scancel', '--signal=TERM', job)
    slurm.go_on(job)
    slurm.wait_for(job, 'COMPLETED', restarts=1)
    log = (place / 'log').read_text()
    assert log.count('saved 0') == log.count('saved 1') == 1
    assert log.count('preempted and saved; the job is RUNNING') == 1


@needs_slurm
@pytest.mark.slow
def test_cancelled_job_saves_and_is_not_requeued(slurm: Slurm, place: pathlib.Path) -> None:
    job = slurm.submit(place, '--', CONFIG)
    both_ready(place)
    slurm.ask('scancel', job)
    slurm.wait_for(job, 'CANCELLED', restarts=0)
    command.wait_for(lambda: 'the job is COMPLETING' in (place / 'log').read_text())
    assert 'saved 1' in (place / 'log').read_text()


@needs_slurm
@pytest.mark.slow
def test_preempted_job_resumes(slurm: Slurm, place: pathlib.Path) -> None:
    job = slurm.submit(place, '--', CONFIG)
    both_ready(place)
    first = '#!/bin/bash\n#SBATCH --partition=high --ntasks=2 --output=/dev/null\ntrue\n'
    other = slurm.ask('sbatch', '--parsable', text=first)
    slurm.wait_for(other, 'COMPLETED', restarts=0)
    slurm.go_on(job)
    slurm.wait_for(job, 'COMPLETED', restarts=1)
    assert 'saved 1' in (place / 'log').read_text()


@needs_slurm
@pytest.mark.slow
def test_tasks_get_a_signal_before_the_time_limit(slurm: Slurm, place: pathlib.Path) -> None:
    job = slurm.submit(place, '--time=2', '--save_secs=30', '--', CONFIG)
    both_ready(place)
    command.wait_for(lambda: 'saved 1' in (place / 'log').read_text(), secs=120)
    slurm.go_on(job)
    slurm.wait_for(job, 'COMPLETED', restarts=1)


@needs_slurm
@pytest.mark.slow
def test_failed_job_is_not_requeued(slurm: Slurm, place: pathlib.Path) -> None:
    job = slurm.submit(place, '--', CONFIG, 'fail')
    slurm.wait_for(job, 'FAILED', restarts=0)
    assert slurm.shown(job)['ExitCode'] == '3:0'


@needs_slurm
@pytest.mark.slow
def test_trainer_is_requeued_and_finishes(slurm: Slurm, tmp_path: pathlib.Path) -> None:
    trainer = (*command.SMALL, '--config.train_for=3000steps', '--config.log.every=20steps')
    place = ('--setup=export JAX_PLATFORMS=cpu', '--', command.MLP, f'--workdir={tmp_path}/run')
    job = slurm.submit(command.ROOT, f'--output={tmp_path}/log', *place, *trainer)
    command.wait_for(command.rows_written(tmp_path / 'run', 2), secs=120)
    slurm.ask('scancel', '--signal=TERM', job)
    slurm.go_on(job)
    slurm.wait_for(job, 'COMPLETED', restarts=1, secs=240)
    assert 'mesh data 2' in (tmp_path / 'log').read_text()
    assert command.result(tmp_path / 'run')['step'] == 3000
