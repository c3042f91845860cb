#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Starts several processes of one run on this machine.

  launch/processes.py -n 2 -- --config=configs/mnist.py
  launch/processes.py -n 2 --devices_per_process=4 -- --config=configs/mnist_mlp.py
  launch/processes.py -n 8 --platform=cuda --restarts=10 -- --config=configs/mnist.py

Each line of output begins with the number of its process. If a process fails, the others are
terminated, and the launcher exits with its exit code. Ctrl-C and SIGTERM are forwarded to all
processes, which save and exit; a second Ctrl-C kills them. No process outlives the launcher, even
if the launcher is killed.
"""

from __future__ import annotations

import argparse
import os
import queue
import shlex
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

import common
import group

_COUNT_FLAG = '--xla_force_host_platform_device_count'


def environments(args: argparse.Namespace, inherited: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns the environment of each process: its platform and its devices.

    Args:
        args: the launcher's flags.
        inherited: the environment of the launcher.

    Raises:
        ValueError: if `CUDA_VISIBLE_DEVICES` of the launcher has fewer GPUs than are needed.
    """
    count, each = args.processes, args.devices_per_process
    # The checkout first, so that the processes run this code even if the package is installed.
    path = os.pathsep.join(filter(None, [str(common.ROOT), inherited.get('PYTHONPATH')]))
    base = {**inherited, 'JAX_PLATFORMS': args.platform, 'PYTHONPATH': path}
    if args.platform == 'cpu':
        # Replaces an inherited number of virtual devices.
        flags = [f for f in inherited.get('XLA_FLAGS', '').split() if not f.startswith(_COUNT_FLAG)]
        return [{**base, 'XLA_FLAGS': ' '.join([*flags, f'{_COUNT_FLAG}={each}'])}] * count
    # Each process sees only its own GPUs, of those that the launcher may use.
    visible = inherited.get('CUDA_VISIBLE_DEVICES')
    devices = visible.split(',') if visible else [str(i) for i in range(count * each)]
    if len(devices) < count * each:
        raise ValueError(
            f'{count} processes of {each} GPUs need {count * each}, but CUDA_VISIBLE_DEVICES='
            f'{visible} has {len(devices)}'
        )
    return [
        {**base, 'CUDA_VISIBLE_DEVICES': ','.join(devices[i * each : (i + 1) * each])}
        for i in range(count)
    ]


def commands(args: argparse.Namespace, trainer: Sequence[str]) -> list[list[str]]:
    """Returns the command of each process, with a free port for the coordinator."""
    program = shlex.split(args.command) or [common.find_python(), '-m', 'trainer.main']
    # Port 0: the system picks a free one, so that several launchers can run on one machine.
    with socket.create_server(('127.0.0.1', 0)) as server:
        coordinator = f'127.0.0.1:{server.getsockname()[1]}'
    cluster = [f'--coordinator={coordinator}', f'--num_processes={args.processes}']
    return [[*program, *trainer, *cluster, f'--process_id={i}'] for i in range(args.processes)]


def run(args: argparse.Namespace, trainer: Sequence[str]) -> int:
    """Runs the processes, restarts them after a preemption, and returns the exit code."""
    events: group.Events = queue.SimpleQueue()
    stop = group.Stop(events)
    environment = environments(args, os.environ)
    with stop.catch_signals():
        for attempt in range(args.restarts + 1):
            if attempt:
                group.report(f'preempted and saved: start {attempt + 1} of {args.restarts + 1}')
            # With new commands, because the port of the last attempt may be in use.
            processes = group.Group(commands(args, trainer), environment, events)
            try:
                code = processes.wait(stop, args.grace_secs)
            finally:
                processes.close()
            # Not after a signal: whoever asked the launcher to end does not want a restart.
            if code != common.EXIT_PREEMPTED or stop.signal is not None:
                break
    if code < 0 and stop.signal == signal.SIGINT:
        return common.EXIT_INTERRUPTED
    # As a shell reports a process that a signal has ended.
    return code if code >= 0 else 128 - code


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the launcher's flags and the trainer's arguments."""
    own, trainer = common.split_arguments(argv)
    parser = common.Parser(__doc__)
    parser.add_argument(
        '-n',
        '--processes',
        type=common.int_at_least(1),
        required=True,
        help='number of processes',
    )
    parser.add_argument(
        '--platform',
        choices=('cpu', 'cuda'),
        default='cpu',
        help='platform of JAX in the processes (default: cpu)',
    )
    parser.add_argument(
        '--devices_per_process',
        type=common.int_at_least(1),
        default=1,
        help='virtual CPU devices, or GPUs, of each process (default: 1)',
    )
    parser.add_argument(
        '--command', default='', help='command to run instead of `python -m trainer.main`'
    )
    parser.add_argument(
        '--restarts',
        type=common.int_at_least(0),
        default=0,
        help='maximum number of restarts after exit code 42 (default: 0)',
    )
    parser.add_argument(
        '--grace_secs',
        type=common.int_at_least(0),
        default=30,
        help='seconds after the failure of a process until the others are killed (default: 30)',
    )
    parser.add_argument('--dry_run', action='store_true', help='only print the commands')
    args = parser.parse_args(own)
    if not args.command:
        common.check_trainer(parser, trainer)
    return args, trainer


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit code."""
    args, trainer = parse(argv)
    try:
        if not args.dry_run:
            return run(args, trainer)
        pairs = zip(commands(args, trainer), environments(args, os.environ), strict=True)
        for command, env in pairs:
            changed = [f'{k}={v}' for k, v in env.items() if os.environ.get(k) != v]
            print(common.quote_command(['env', *changed, *command]))
        return 0
    except (ValueError, OSError) as error:
        print(f'Error: {error}', file=sys.stderr)
        return common.EXIT_MISTAKE


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
