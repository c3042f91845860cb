#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains on a Cloud TPU with one or more workers, using gcloud.

In one command, which also recreates a preempted TPU and resumes. After Ctrl-C the run itself
continues, and the same command waits for it again:

  launch/tpu_pod.py train my-tpu --zone=us-central2-b --accelerator_type=v4-32 \\
      --version=tpu-ubuntu2204-base --spot -- --config=configs/mnist.py --workdir=gs://bucket/run

Or in stages:

  launch/tpu_pod.py create my-tpu --zone=us-central2-b --accelerator_type=v4-32 \\
      --version=tpu-ubuntu2204-base [--spot] [--queued]
  launch/tpu_pod.py copy my-tpu --zone=us-central2-b          # the last commit of this checkout
  launch/tpu_pod.py install my-tpu --zone=us-central2-b
  launch/tpu_pod.py run my-tpu --zone=us-central2-b -- --config=configs/mnist.py \\
      --workdir=gs://bucket/run                               # in the background
  launch/tpu_pod.py logs my-tpu --zone=us-central2-b --follow
  launch/tpu_pod.py wait my-tpu --zone=us-central2-b          # exit code: that of the trainer
  launch/tpu_pod.py stop my-tpu --zone=us-central2-b          # saves first
  launch/tpu_pod.py delete my-tpu --zone=us-central2-b [--queued]

Each worker restarts the trainer after exit code 42. All files are in ~/train of the workers.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import common
import tpu_remote

# The exit code of ssh if the connection fails. The trainer has no such code.
SSH_FAILED = 255


class CommandError(Exception):
    """A command failed; it has printed the reason itself."""

    def __init__(self, code: int, words: Sequence[str]) -> None:
        # Only the first line: scripts for the workers have many.
        first, *rest = common.quote_command(words).splitlines()
        super().__init__(f'exit code {code} of: {first}{" ..." if rest else ""}')
        self.code = code


class Pod:
    """The commands of this launcher, for one TPU."""

    def __init__(self, args: argparse.Namespace, trainer: Sequence[str]) -> None:
        self._args = args
        self._trainer = trainer
        self._where = [f'--zone={args.zone}']
        if args.project:
            self._where.append(f'--project={args.project}')

    def create(self) -> None:
        """Creates the TPU, or requests it as a queued resource."""
        a = self._args
        spot = ['--spot'] if a.spot else []
        kind = [f'--accelerator-type={a.accelerator_type}']
        if a.queued:
            kind += [f'--runtime-version={a.version}', f'--node-id={a.name}']
            self._gcloud('queued-resources', 'create', a.name, *kind, *spot)
        else:
            self._gcloud('tpu-vm', 'create', a.name, *kind, f'--version={a.version}', *spot)

    def copy(self) -> None:
        """Copies the last commit of the checkout to all workers."""
        source = ['git', '-C', self._args.source]
        changed = subprocess.run([*source, 'status', '--porcelain'], capture_output=True, text=True)
        if changed.stdout:
            count = changed.stdout.count('\n')
            print(f'Warning: {count} uncommitted changes are not copied', file=sys.stderr)
        with tempfile.TemporaryDirectory() as directory:
            path = str(pathlib.Path(directory) / tpu_remote.ARCHIVE)
            self._call([*source, 'archive', '--format=tar.gz', f'--output={path}', 'HEAD'])
            self._gcloud('tpu-vm', 'scp', path, f'{self._args.name}:', '--worker=all')
        self._ssh('all', tpu_remote.UNPACK)

    def install(self) -> None:
        """Installs the environment on all workers."""
        self._ssh('all', tpu_remote.install_script(self._args.python_version))

    def run(self, if_running: str = 'refuse') -> None:
        """Starts the trainer on all workers, in the background."""
        self._ssh('all', tpu_remote.start_script(self._trainer, self._args.restarts, if_running))

    def logs(self) -> None:
        """Prints the log of a worker."""
        self._ssh(self._args.worker, tpu_remote.logs_script(self._args.lines, self._args.follow))

    def stop(self) -> None:
        """Ends the run; it saves first."""
        self._ssh('all', tpu_remote.STOP)

    def delete(self) -> None:
        """Deletes the TPU, or the queued resource with its TPU."""
        kind = ['queued-resources'] if self._args.queued else ['tpu-vm']
        force = ['--force'] if self._args.queued else []
        self._gcloud(*kind, 'delete', self._args.name, '--quiet', *force)

    def wait(self) -> int:
        """Waits for all workers; returns the trainer's exit code, or `SSH_FAILED` without a TPU."""
        # All workers exit with the same code, so that of worker 0 is enough.
        code = self._ssh_with_retries('0', tpu_remote.WAIT)
        if code != SSH_FAILED:
            # The others end a moment later; the next run must not start before that.
            print('worker 0 has ended; waiting for the others', file=sys.stderr)
            self._ssh_with_retries('all', tpu_remote.END)
        return code

    def train(self) -> int:
        """Runs all stages, again after a preemption, and returns the trainer's exit code."""
        code = common.EXIT_PREEMPTED
        for attempt in range(self._args.restarts + 1):
            if attempt:
                print(f'start {attempt + 1} of {self._args.restarts + 1}', file=sys.stderr)
            try:
                self._prepare(first=attempt == 0)
                # In the first attempt, a run in progress is kept. Later, a worker that has not
                # ended yet belongs to the last attempt, so wait for its end.
                self.run(if_running='await' if attempt else 'keep')
                code = self.wait()
            except CommandError:
                # Any stage can fail because the TPU was preempted meanwhile.
                if self.state() != 'PREEMPTED':
                    raise
                code = SSH_FAILED
            if code not in (common.EXIT_PREEMPTED, SSH_FAILED):
                break
        return code

    def state(self) -> str:
        """Returns the state of the TPU, such as READY or PREEMPTED; '' if it does not exist."""
        return self._describe('tpu-vm', 'state')

    def _prepare(self, first: bool) -> None:
        state = '' if self._args.dry_run else self.state()
        if state == 'READY':
            # The code of a run in progress must not be replaced.
            if first and self._exit_code('0', tpu_remote.ALIVE) != 0:
                self.copy()
                self.install()
            return
        if state:
            print(f'{self._args.name} is {state}: recreating it', file=sys.stderr)
            self.delete()
        self.create()
        while self._args.queued and not self._args.dry_run and self.state() != 'READY':
            request = self._describe('queued-resources', 'state.state')
            if request in ('FAILED', 'SUSPENDED', ''):
                raise CommandError(1, ['create', '--queued', f'(now {request or "gone"})'])
            time.sleep(self._args.poll_secs)
        self.copy()
        self.install()

    def _describe(self, kind: str, field: str) -> str:
        words = ['gcloud', 'compute', 'tpus', kind, 'describe', self._args.name, *self._where]
        done = subprocess.run(
            [*words, f'--format=value({field})'], stdout=subprocess.PIPE, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else ''

    def _ssh(self, worker: str, script: str) -> None:
        self._gcloud('tpu-vm', 'ssh', self._args.name, f'--worker={worker}', f'--command={script}')

    def _ssh_with_retries(self, worker: str, script: str) -> int:
        """Returns the exit code of a script; reconnects as long as the TPU is READY."""
        while (code := self._exit_code(worker, script)) == SSH_FAILED and self.state() == 'READY':
            time.sleep(self._args.poll_secs)
        return code

    def _exit_code(self, worker: str, script: str) -> int:
        try:
            self._ssh(worker, script)
        except CommandError as error:
            return error.code
        return 0

    def _gcloud(self, *words: str) -> None:
        self._call(['gcloud', 'compute', 'tpus', *words, *self._where])

    def _call(self, words: Sequence[str]) -> None:
        if self._args.dry_run:
            print(common.quote_command(words))
            return
        code = subprocess.run(words).returncode
        if code:
            raise CommandError(code, words)


def _parser() -> common.Parser:
    parser = common.Parser(__doc__)
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='COMMAND')
    for verb in ('train', 'create', 'copy', 'install', 'run', 'logs', 'wait', 'stop', 'delete'):
        add = verbs.add_parser(verb, description=getattr(Pod, verb).__doc__).add_argument
        add('name', help='name of the TPU')
        add('--zone', required=True)
        add('--project', help="default: gcloud's default project")
        add('--dry_run', action='store_true', help='only print the commands')
        if verb in ('train', 'create'):
            add('--accelerator_type', required=True, help='such as v4-32 or v5litepod-16')
            add('--version', required=True, help='software version, such as v2-alpha-tpuv5-lite')
            add('--spot', action='store_true', help='a Spot TPU: cheaper, but may be preempted')
        if verb in ('train', 'create', 'delete'):
            add('--queued', action='store_true', help='use a queued resource')
        if verb in ('train', 'copy'):
            add('--source', default=str(common.ROOT), help='a git checkout (default: this one)')
        if verb in ('train', 'install'):
            add('--python_version', default='3.12', help='default: 3.12')
        if verb in ('train', 'run'):
            at_least_zero = common.int_at_least(0)
            add('--restarts', type=at_least_zero, default=100, help='maximum (default: 100)')
        if verb in ('train', 'wait'):
            add('--poll_secs', type=float, default=30, help='seconds between polls (default: 30)')
        if verb == 'logs':
            add('--worker', default='0', help="a number, or 'all' (default: 0)")
            add('--lines', type=common.int_at_least(0), default=100, help='default: 100')
            add('--follow', action='store_true', help='keep printing new lines')
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit code."""
    own, trainer = common.split_arguments(argv)
    parser = _parser()
    args = parser.parse_args(own)
    if args.verb in ('train', 'run'):
        common.check_trainer(parser, trainer)
        if not (common.flag_value(trainer, 'workdir') or '').startswith('gs://'):
            parser.error('the workers do not share a disk: add -- --workdir=gs://bucket/...')
    elif trainer:
        parser.error(f'{args.verb} does not start the trainer: remove the arguments after `--`')
    if not args.dry_run and shutil.which('gcloud') is None:
        parser.error('there is no gcloud on the PATH; install the Google Cloud CLI')
    try:
        return getattr(Pod(args, trainer), args.verb)() or 0
    except CommandError as error:
        print(f'Error: {error}', file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return common.EXIT_INTERRUPTED


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
