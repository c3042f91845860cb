#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints a batch script for Slurm, or submits it.

  launch/slurm.py --gpus_per_node=8 --time=8:00:00 -- --config=configs/mnist.py
  launch/slurm.py --nodes=4 --gpus_per_node=8 --partition=gpu --account=lab --submit \\
      --setup='module load cuda' --sbatch=--mem=0 -- --config=configs/mnist.py --workdir=/shared/a

One task runs on each GPU; the tasks find each other without flags. --save_secs before the time
limit, or when the job is preempted, the run saves and exits, and the job is requeued. It then
resumes from the checkpoint. `scancel --signal=TERM JOB` does the same. `scancel JOB` saves if the
cluster's KillWait is long enough, and ends the job permanently.

Start it in a directory that all nodes share: the job runs there.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

import common

# Directories that are local to a node.
_LOCAL = ('/tmp', '/var/tmp', '/dev/shm')

# `squeue` prints COMPLETING if the job was cancelled, has reached its time limit, or is being
# requeued by Slurm itself. Only a job that is still RUNNING may requeue itself.
_SCRIPT = """\
#!/bin/bash
{directives}

# The tasks get SIGTERM. If this shell gets it as well, it must outlive them. With an empty handler
# ('') instead of `:`, the tasks would inherit that the signal is ignored.
trap : TERM
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}
{setup}
srun {srun} {command}
code=$?

if [ "$code" = {preempted} ]; then
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    echo "preempted and saved; the job is $state"
    if [ "$state" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
"""


def script(args: argparse.Namespace, trainer: Sequence[str]) -> str:
    """Returns the text of the batch script."""
    tasks = args.gpus_per_node or args.tasks_per_node
    directives = [
        f'--job-name={args.name}',
        f'--nodes={args.nodes}',
        f'--ntasks-per-node={tasks}',
        # For the node and not for the task: JAX selects the GPU of each task among all of the node.
        *([f'--gpus-per-node={args.gpus_per_node}'] if args.gpus_per_node else []),
        *([f'--cpus-per-task={args.cpus_per_task}'] if args.cpus_per_task else []),
        *([f'--time={args.time}'] if args.time else []),
        *([f'--partition={args.partition}'] if args.partition else []),
        *([f'--account={args.account}'] if args.account else []),
        # Without `B:`, the signal goes to the tasks and not to the shell.
        f'--signal=TERM@{args.save_secs}',
        '--requeue',
        # Otherwise a requeued job would overwrite its log.
        '--open-mode=append',
        f'--chdir={shlex.quote(args.chdir)}',
        f'--output={shlex.quote(args.output)}',
        *args.sbatch,
    ]
    srun = [
        # A task may exit with code 42 while another one still commits the checkpoint.
        '--kill-on-bad-exit=0',
        f'--wait={args.save_secs}',
        # srun does not inherit it from the job.
        *([f'--cpus-per-task={args.cpus_per_task}'] if args.cpus_per_task else []),
    ]
    return _SCRIPT.format(
        directives='\n'.join(f'#SBATCH {directive}' for directive in directives),
        root=shlex.quote(str(common.ROOT)),
        setup='\n'.join(args.setup),
        srun=' '.join(srun),
        command=common.quote_command([args.python, '-m', 'trainer.main', *trainer]),
        preempted=common.EXIT_PREEMPTED,
    )


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the launcher's flags and the trainer's arguments, both checked."""
    own, trainer = common.split_arguments(argv)
    parser = common.Parser(__doc__)
    positive, natural = common.int_at_least(1), common.int_at_least(0)
    add = parser.add_argument
    add('--nodes', type=positive, default=1, help='number of nodes (default: 1)')
    add('--gpus_per_node', type=natural, default=0, help='GPUs, with one task each (default: 0)')
    add('--tasks_per_node', type=positive, default=1, help='tasks without GPUs (default: 1)')
    add('--cpus_per_task', type=natural, default=0, help="CPUs of a task (default: the cluster's)")
    add('--time', help="time limit: 30, 8:00:00 or 2-00:00:00 (default: the partition's)")
    add('--partition')
    add('--account')
    add('--name', default='train', help='name of the job (default: train)')
    add('--save_secs', type=positive, default=120, help='maximum seconds of a save (default: 120)')
    # Expanded here: the script quotes its paths, so its shell does not expand them.
    home = os.path.expanduser
    add('--chdir', type=home, default=os.getcwd(), help='directory of the job (default: this one)')
    add(
        '--output',
        type=home,
        default='slurm-%j.out',
        help='log, relative to --chdir (default: %(default)s)',
    )
    add('--setup', action='append', default=[], help='shell command to run first; repeatable')
    add('--sbatch', action='append', default=[], help='additional option of sbatch; repeatable')
    add('--python', type=home, default=common.find_python(), help='Python (default: %(default)s)')
    add('--submit', action='store_true', help='submit the script instead of printing it')
    add('--dry_run', action='store_true', help='with --submit: print what would be submitted')
    args = parser.parse_args(own)
    _check(parser, args, trainer)
    return args, trainer


def _check(parser: common.Parser, args: argparse.Namespace, trainer: Sequence[str]) -> None:
    common.check_trainer(parser, trainer)
    if args.time:
        _check_time(parser, args)
    if args.gpus_per_node and args.tasks_per_node not in (1, args.gpus_per_node):
        parser.error(
            f'--tasks_per_node={args.tasks_per_node} with --gpus_per_node={args.gpus_per_node}: '
            'one task runs on each GPU; remove --tasks_per_node'
        )
    for option in args.sbatch:
        if not option.startswith('-'):
            parser.error(
                f'--sbatch={option}: expected an option of sbatch, such as --sbatch=--mem=0'
            )
    # The trainer's own default is below the current directory.
    workdir = common.flag_value(trainer, 'workdir') or 'runs'
    if '://' not in workdir:
        path = pathlib.Path(os.path.normpath(os.path.join(args.chdir, os.path.expanduser(workdir))))
        if args.nodes > 1 and any(path.is_relative_to(local) for local in _LOCAL):
            parser.error(
                f'the work directory {path} is local to each node: set a shared one with '
                '-- --workdir=..., or start in a shared directory'
            )


def _check_time(parser: common.Parser, args: argparse.Namespace) -> None:
    secs = seconds(args.time)
    if secs is None:
        parser.error(f'--time={args.time}: expected minutes, hours:minutes:seconds or days-hours')
    # Slurm may send the signal a minute early, and a job that makes no progress would be requeued
    # forever.
    if secs <= args.save_secs + 60:
        parser.error(
            f'--time={args.time} is {secs} s: expected more than --save_secs={args.save_secs} and '
            'a minute. Increase --time, or decrease --save_secs'
        )


def seconds(time: str) -> int | None:
    """Returns the seconds of a time limit in Slurm's notation, or None if it is not one."""
    days, dash, rest = time.rpartition('-')
    fields = rest.split(':')
    if not all(field.isdecimal() for field in (*fields, days or '0')) or len(fields) > 3:
        return None
    # After days, the first number is hours. Without days, one number is minutes, and two are
    # minutes and seconds.
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    total = sum(unit * int(field) for unit, field in zip(units, fields, strict=False))
    return total + 86400 * int(days or 0)


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit code: that of sbatch, with --submit."""
    args, trainer = parse(argv)
    text = script(args, trainer)
    if not args.submit:
        print(text, end='')
        return 0
    if args.dry_run:
        print(f"sbatch << 'END'\n{text}END")
        return 0
    if shutil.which('sbatch') is None:
        print('Error: there is no sbatch on the PATH; submit from a login node.', file=sys.stderr)
        return common.EXIT_MISTAKE
    return subprocess.run(['sbatch'], input=text, text=True).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
