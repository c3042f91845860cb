#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains on a Cloud TPU of one or many workers, with gcloud.

In one command, which also brings a preempted TPU back and goes on (end it with Ctrl-C, and the run
itself continues; the same command looks after it again):

  launch/tpu_pod.py train my-tpu --zone=us-central2-b --accelerator_type=v4-32 \\
      --version=tpu-ubuntu2204-base --spot -- --config=configs/mnist.py --workdir=gs://bucket/run

Or step by step:

  launch/tpu_pod.py create my-tpu --zone=us-central2-b --accelerator_type=v4-32 \\
      --version=tpu-ubuntu2204-base [--spot] [--queued]
  launch/tpu_pod.py copy my-tpu --zone=us-central2-b          # the last commit of this checkout
  launch/tpu_pod.py install my-tpu --zone=us-central2-b
  launch/tpu_pod.py run my-tpu --zone=us-central2-b -- --config=configs/mnist.py \\
      --workdir=gs://bucket/run                               # in the background
  launch/tpu_pod.py logs my-tpu --zone=us-central2-b --follow
  launch/tpu_pod.py wait my-tpu --zone=us-central2-b          # exits as the trainer does
  launch/tpu_pod.py stop my-tpu --zone=us-central2-b          # saves first
  launch/tpu_pod.py delete my-tpu --zone=us-central2-b [--queued]

Each worker starts the trainer again after exit code 42. All of it lives in ~/train of the workers.
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

SSH_FAILED = 255


class CommandError(Exception):
    """A command failed; it has said why itself."""

    def __init__(self, code: int, words: Sequence[str]) -> None:
        first, *rest = common.shown(words).splitlines()
        super().__init__(f'exit code {code} of: {first}{" ..." if rest else ""}')
        self.code = code


class Pod:
    """The commands for one TPU; `args` are those of the command line."""

    def __init__(self, args: argparse.Namespace, trainer: Sequence[str]) -> None:
        self._args = args
        self._trainer = trainer
        self._where = [f'--zone={args.zone}']
        if args.project:
            self._where.append(f'--project={args.project}')

    def create(self) -> None:
        """Asks for the TPU, and waits until it is there unless the request is queued."""
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
        """Makes the environment on all workers."""
        self._ssh('all', tpu_remote.install(self._args.python_version))

    def run(self, under_way: str = 'refuse') -> None:
        """Starts the trainer on all workers, in the background."""
        self._ssh('all', tpu_remote.start(self._trainer, self._args.restarts, under_way))

    def logs(self) -> None:
        """Prints the log of a worker."""
        self._ssh(self._args.worker, tpu_remote.logs(self._args.lines, self._args.follow))

    def stop(self) -> None:
        """Asks the run to save and end."""
        self._ssh('all', tpu_remote.STOP)

    def delete(self) -> None:
        """Gives the TPU back, and the request for it."""
        kind = ['queued-resources'] if self._args.queued else ['tpu-vm']
        force = ['--force'] if self._args.queued else []
        self._gcloud(*kind, 'delete', self._args.name, '--quiet', *force)

    def wait(self) -> int:
        """Waits for all workers; returns the trainer's exit code, or `SSH_FAILED` without a TPU."""
        code = self._persist('0', tpu_remote.WAIT)
        if code != SSH_FAILED:
            # They end a moment later, and the next run must not meet them.
            print('worker 0 has ended; waiting for the others', file=sys.stderr)
            self._persist('all', tpu_remote.END)
        return code

    def train(self) -> int:
        """Does everything, again after a preemption, and returns the trainer's exit code."""
        code = common.EXIT_PREEMPTED
        for attempt in range(self._args.restarts + 1):
            if attempt:
                print(f'start {attempt + 1} of {self._args.restarts + 1}', file=sys.stderr)
            try:
                self._make_ready(first=attempt == 0)
                # Later, some worker may not have ended yet, and must not be taken for started.
                self.run(under_way='await' if attempt else 'keep')
                code = self.wait()
            except CommandError:
                if self.state() != 'PREEMPTED':
                    raise
                code = SSH_FAILED
            if code not in (common.EXIT_PREEMPTED, SSH_FAILED):
                break
        return code

    def state(self) -> str:
        """Returns READY, PREEMPTED or the like, or '' if there is no such TPU."""
        return self._read('tpu-vm', 'state')

    def _make_ready(self, first: bool) -> None:
        state = '' if self._args.dry_run else self.state()
        if state == 'READY':
            if first and self._code('0', tpu_remote.ALIVE) != 0:
                self.copy()
                self.install()
            return
        if state:
            print(f'{self._args.name} is {state}: making it anew', file=sys.stderr)
            self.delete()
        self.create()
        while self._args.queued and not self._args.dry_run and self.state() != 'READY':
            request = self._read('queued-resources', 'state.state')
            if request in ('FAILED', 'SUSPENDED', ''):
                raise CommandError(1, ['create', '--queued', f'(now {request or "gone"})'])
            time.sleep(self._args.poll_secs)
        self.copy()
        self.install()

    def _read(self, kind: str, field: str) -> str:
        words = ['gcloud', 'compute', 'tpus', kind, 'describe', self._args.name, *self._where]
        done = subprocess.run(
            [*words, f'--format=value({field})'], stdout=subprocess.PIPE, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else ''

    def _ssh(self, worker: str, script: str) -> None:
        self._gcloud('tpu-vm', 'ssh', self._args.name, f'--worker={worker}', f'--command={script}')

    def _persist(self, worker: str, script: str) -> int:
        """Returns the script's exit code; while the TPU is there, broken connections are mended."""
        while (code := self._code(worker, script)) == SSH_FAILED and self.state() == 'READY':
            time.sleep(self._args.poll_secs)
        return code

    def _code(self, worker: str, script: str) -> int:
        try:
            self._ssh(worker, script)
        except CommandError as error:
            return error.code
        return 0

    def _gcloud(self, *words: str) -> None:
        self._call(['gcloud', 'compute', 'tpus', *words, *self._where])

    def _call(self, words: Sequence[str]) -> None:
        if self._args.dry_run:
            print(common.shown(words))
            return
        code = subprocess.run(words).returncode
        if code:
            raise CommandError(code, words)


def _parser() -> common.Parser:
    parser = common.Parser(__doc__)
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='COMMAND')
    for verb in ('train', 'create', 'copy', 'install', 'run', 'logs', 'wait', 'stop', 'delete'):
        add = verbs.add_parser(verb, description=getattr(Pod, verb).__doc__).add_argument
        add('name', help='of the TPU')
        add('--zone', required=True)
        add('--project', help="default: gcloud's own")
        add('--dry_run', action='store_true', help='print the commands only')
        if verb in ('train', 'create'):
            add('--accelerator_type', required=True, help='as in v4-32 or v5litepod-16')
            add('--version', required=True, help='of the software, as in v2-alpha-tpuv5-lite')
            add('--spot', action='store_true', help='cheaper, and may be preempted')
        if verb in ('train', 'create', 'delete'):
            add('--queued', action='store_true', help='as a queued resource')
        if verb in ('train', 'copy'):
            add('--source', default=str(common.ROOT), help='a git checkout; default: this one')
        if verb in ('train', 'install'):
            add('--python_version', default='3.12', help='default: 3.12')
        if verb in ('train', 'run'):
            add('--restarts', type=common.at_least(0), default=100, help='default: 100')
        if verb in ('train', 'wait'):
            add('--poll_secs', type=float, default=30, help='default: 30')
        if verb == 'logs':
            add('--worker', default='0', help="a number, or 'all' (default: 0)")
            add('--lines', type=common.at_least(0), default=100, help='default: 100')
            add('--follow', action='store_true', help='go on with what comes')
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit code."""
    own, trainer = common.split(argv)
    parser = _parser()
    args = parser.parse_args(own)
    if args.verb in ('train', 'run'):
        common.check_trainer(parser, trainer)
        if not (common.flag(trainer, 'workdir') or '').startswith('gs://'):
            parser.error('the workers share no disk: add -- --workdir=gs://bucket/...')
    elif trainer:
        parser.error(f'{args.verb} starts no trainer: nothing may follow `--`')
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
