#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints a batch script for SLURM, or submits it.

  launch/slurm.py --gpus_per_node=8 --time=8:00:00 -- --config=configs/mnist.py
  launch/slurm.py --nodes=4 --gpus_per_node=8 --partition=gpu --account=lab --submit \\
      --setup='module load cuda' --sbatch=--mem=0 -- --config=configs/mnist.py --workdir=/shared/a

One task runs on each GPU; the trainer finds the others by itself. Some time before the limit
(--save_secs) and when it is preempted, the run saves, ends, and is put back into the queue, where
it goes on from what it saved. `scancel --signal=TERM JOB` does the same; `scancel JOB` saves if
the cluster's KillWait is long enough, and ends the job for good.

Start it in a directory that all nodes see: the job runs there.
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

# Places that each node has for itself.
_LOCAL = ('/tmp', '/var/tmp', '/dev/shm')

# `squeue` says COMPLETING once the job was cancelled, ran into its limit, or is being requeued by
# SLURM itself; only a job that still runs may put itself back.
_SCRIPT = """\
#!/bin/bash
{directives}

# SIGTERM goes to the tasks. Where it comes here too, this shell has to outlive them; a handler is
# not inherited by what it starts, as '' would be.
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
        # For the node and not for the task: JAX picks the GPU of each task among all of the node.
        *([f'--gpus-per-node={args.gpus_per_node}'] if args.gpus_per_node else []),
        *([f'--cpus-per-task={args.cpus_per_task}'] if args.cpus_per_task else []),
        *([f'--time={args.time}'] if args.time else []),
        *([f'--partition={args.partition}'] if args.partition else []),
        *([f'--account={args.account}'] if args.account else []),
        # Without `B:`, to the tasks of each step and not to the shell.
        f'--signal=TERM@{args.save_secs}',
        '--requeue',
        '--open-mode=append',
        f'--chdir={shlex.quote(args.chdir)}',
        f'--output={shlex.quote(args.output)}',
        *args.sbatch,
    ]
    srun = [
        # One task may have ended while another one still commits the save.
        '--kill-on-bad-exit=0',
        f'--wait={args.save_secs}',
        # srun does not take it from the job.
        *([f'--cpus-per-task={args.cpus_per_task}'] if args.cpus_per_task else []),
    ]
    return _SCRIPT.format(
        directives='\n'.join(f'#SBATCH {directive}' for directive in directives),
        root=shlex.quote(str(common.ROOT)),
        setup='\n'.join(args.setup),
        srun=' '.join(srun),
        command=common.shown([args.python, '-m', 'trainer.main', *trainer]),
        preempted=common.EXIT_PREEMPTED,
    )


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the launcher's flags and the trainer's arguments, both checked."""
    own, trainer = common.split(argv)
    parser = common.Parser(__doc__)
    positive, natural = common.at_least(1), common.at_least(0)
    add = parser.add_argument
    add('--nodes', type=positive, default=1, help='default: 1')
    add('--gpus_per_node', type=natural, default=0, help='one task for each (default: 0)')
    add('--tasks_per_node', type=positive, default=1, help='without GPUs (default: 1)')
    add('--cpus_per_task', type=natural, default=0, help="default: the cluster's")
    add('--time', help="limit, as 30, 8:00:00 or 2-00:00:00 (default: the partition's)")
    add('--partition')
    add('--account')
    add('--name', default='train', help='of the job (default: train)')
    add('--save_secs', type=positive, default=120, help='how long a save may take (default: 120)')
    home = os.path.expanduser  # The script quotes its paths, so its shell does not.
    add('--chdir', type=home, default=os.getcwd(), help='where the job runs (default: here)')
    add(
        '--output',
        type=home,
        default='slurm-%j.out',
        help='log, relative to --chdir (default: %(default)s)',
    )
    add('--setup', action='append', default=[], help='shell line to run first; may be repeated')
    add('--sbatch', action='append', default=[], help='further option of sbatch; may be repeated')
    add('--python', type=home, default=common.python(), help='default: %(default)s')
    add('--submit', action='store_true', help='submit the script; without it, print it')
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
            'one task runs on each GPU; leave --tasks_per_node out'
        )
    for option in args.sbatch:
        if not option.startswith('-'):
            parser.error(f'--sbatch={option}: expected an option of sbatch, as in --sbatch=--mem=0')
    workdir = common.flag(trainer, 'workdir') or 'runs'
    if '://' not in workdir:
        place = pathlib.Path(
            os.path.normpath(os.path.join(args.chdir, os.path.expanduser(workdir)))
        )
        if args.nodes > 1 and any(place.is_relative_to(local) for local in _LOCAL):
            parser.error(
                f'the work directory {place} is one that each node has for itself: name a shared '
                'one with -- --workdir=..., or start in a shared directory'
            )


def _check_time(parser: common.Parser, args: argparse.Namespace) -> None:
    secs = seconds(args.time)
    if secs is None:
        parser.error(f'--time={args.time}: expected minutes, hours:minutes:seconds or days-hours')
    # SLURM may send the signal a minute earlier, and a job that gets nowhere is requeued for ever.
    if secs <= args.save_secs + 60:
        parser.error(
            f'--time={args.time} is {secs} s, which --save_secs={args.save_secs} and a minute '
            'would use up: give more time, or fewer seconds for a save'
        )


def seconds(time: str) -> int | None:
    """Returns the seconds of a time limit as SLURM writes it, or None if it is not one."""
    days, dash, rest = time.rpartition('-')
    fields = rest.split(':')
    if not all(field.isdecimal() for field in (*fields, days or '0')) or len(fields) > 3:
        return None
    # After days come hours; alone, one number is minutes, and two are minutes and seconds.
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    total = sum(unit * int(field) for unit, field in zip(units, fields, strict=False))
    return total + 86400 * int(days or 0)


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit code: that of sbatch, if it submits."""
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
