# SPDX-License-Identifier: Apache-2.0
"""A private Slurm cluster: real daemons for one node, in a directory, on free ports."""

from __future__ import annotations

import contextlib
import datetime
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from tests import command

LAUNCHER = command.ROOT / 'launch' / 'slurm.py'
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=20
SchedulerParameters=sched_interval=1,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes={host} State=UP PriorityTier=2
"""
PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'squeue', 'scontrol', 'scancel')
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]


def launch(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, LAUNCHER, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
    )


def free_port() -> int:
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


class Slurm:
    """A Slurm cluster with one node and two priorities, apart from any other on the machine."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.env = {**os.environ, 'SLURM_CONF': str(root / 'slurm.conf'), 'XLA_FLAGS': ''}

    @contextlib.contextmanager
    def running(self) -> Iterator[Slurm]:
        (self.root / 'slurm.conf').write_text(
            CONF.format(
                root=self.root,
                user=os.environ.get('USER', 'root') if os.getuid() else 'root',
                host=socket.gethostname().partition('.')[0],
                ports=(free_port(), free_port()),
            )
        )
        for name in ('state', 'spool'):
            (self.root / name).mkdir()
        (self.root / 'key').write_bytes(os.urandom(1024))
        (self.root / 'key').chmod(0o600)
        munge = [f'--{n}-file={self.root}/{n}' for n in ('key', 'pid', 'log', 'seed')]
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                self._daemon(
                    'munged', '--foreground', '--force', f'--socket={self.root}/munge.sock', *munge
                )
            )
            command.wait_for((self.root / 'munge.sock').exists)
            stack.enter_context(self._daemon('slurmctld', '-D'))
            stack.enter_context(self._daemon('slurmd', '-D'))
            command.wait_for(lambda: 'idle' in self.ask('sinfo', '--noheader', check=False))
            try:
                yield self
            finally:
                self.ask('scancel', '--full', '--signal=KILL', '--state=RUNNING', check=False)
                self.ask('scancel', '--state=PENDING', check=False)
                command.wait_for(lambda: not self.ask('squeue', '--noheader', check=False))

    @contextlib.contextmanager
    def _daemon(self, *words: str) -> Iterator[None]:
        with open(self.root / f'{words[0]}.log', 'w') as log:
            daemon = subprocess.Popen(words, env=self.env, stdout=log, stderr=log)
            try:
                yield
            finally:
                daemon.terminate()
                daemon.wait(timeout=30)

    def ask(self, *words: str, check: bool = True, text: str | None = None) -> str:
        done = subprocess.run(
            words, env=self.env, input=text, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def submit(self, place: pathlib.Path, *arguments: str) -> str:
        """Submits a job of two tasks in this directory, and returns its number."""
        done = launch(
            '--tasks_per_node=2', f'--chdir={place}', '--output=log', '--submit', *arguments,
            env=self.env,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def show_job(self, job: str) -> dict[str, str]:
        words = self.ask('scontrol', 'show', 'job', job).split()
        return dict(word.split('=', 1) for word in words if '=' in word)

    def wait_for(self, job: str, state: str, restarts: int, secs: float = 60) -> None:
        deadline = time.monotonic() + secs
        while True:
            shown = self.show_job(job)
            if (shown['JobState'], shown['Restarts']) == (state, str(restarts)):
                return
            assert time.monotonic() < deadline, shown
            time.sleep(0.2)

    def go_on(self, job: str) -> None:
        """Starts a requeued job now; Slurm would wait for two minutes."""
        self.wait_for(job, 'PENDING', restarts=1)

        def has_started() -> bool:
            shown = self.show_job(job)
            if shown['JobState'] != 'PENDING':
                return True
            start = datetime.datetime.fromisoformat(shown['EligibleTime'])
            # Slurm may set it again when the last task has ended. And in the second of its end, a
            # job cannot be started.
            if start > datetime.datetime.now() + datetime.timedelta(seconds=30):
                self.ask('scontrol', 'update', f'JobId={job}', 'StartTime=now+3', check=False)
            return False

        command.wait_for(has_started)
