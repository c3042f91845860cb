#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Starts several processes of one run on this machine.

  launch/processes.py -n 2 -- --config=configs/mnist.py
  launch/processes.py -n 2 --devices_per_process=4 -- --config=configs/mnist_mlp.py
  launch/processes.py -n 8 --platform=cuda --restarts=10 -- --config=configs/mnist.py

Each line of output says which process wrote it. The first process that fails ends the others, and
its exit code is the launcher's. Ctrl-C and SIGTERM are passed on to all of them: they save and
end; a second Ctrl-C kills. Whatever happens to the launcher, none of its processes outlives it.
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

    Raises:
        ValueError: if the inherited environment offers fewer GPUs than are needed.
    """
    count, each = args.processes, args.devices_per_process
    path = os.pathsep.join(filter(None, [str(common.ROOT), inherited.get('PYTHONPATH')]))
    base = {**inherited, 'JAX_PLATFORMS': args.platform, 'PYTHONPATH': path}
    if args.platform == 'cpu':
        flags = [f for f in inherited.get('XLA_FLAGS', '').split() if not f.startswith(_COUNT_FLAG)]
        return [{**base, 'XLA_FLAGS': ' '.join([*flags, f'{_COUNT_FLAG}={each}'])}] * count
    visible = inherited.get('CUDA_VISIBLE_DEVICES')
    devices = visible.split(',') if visible else [str(i) for i in range(count * each)]
    if len(devices) < count * each:
        raise ValueError(
            f'{count} processes of {each} GPUs need {count * each}, and CUDA_VISIBLE_DEVICES='
            f'{visible} offers {len(devices)}'
        )
    return [
        {**base, 'CUDA_VISIBLE_DEVICES': ','.join(devices[i * each : (i + 1) * each])}
        for i in range(count)
    ]


def commands(args: argparse.Namespace, trainer: Sequence[str]) -> list[list[str]]:
    """Returns the command of each process, which meet at a port that is free now."""
    program = shlex.split(args.command) or [common.python(), '-m', 'trainer.main']
    with socket.create_server(('127.0.0.1', 0)) as server:
        coordinator = f'127.0.0.1:{server.getsockname()[1]}'
    cluster = [f'--coordinator={coordinator}', f'--num_processes={args.processes}']
    return [[*program, *trainer, *cluster, f'--process_id={i}'] for i in range(args.processes)]


def run(args: argparse.Namespace, trainer: Sequence[str]) -> int:
    """Runs the processes, again if they were preempted, and returns the exit code."""
    events: group.Events = queue.SimpleQueue()
    stop = group.Stop(events)
    environment = environments(args, os.environ)
    with stop.listening():
        for attempt in range(args.restarts + 1):
            if attempt:
                group.say(f'preempted and saved: start {attempt + 1} of {args.restarts + 1}')
            started = group.Group(commands(args, trainer), environment, events)
            try:
                code = started.wait(stop, args.grace_secs)
            finally:
                started.close()
            if code != common.EXIT_PREEMPTED or stop.signal is not None:
                break
    if code < 0 and stop.signal == signal.SIGINT:
        return common.EXIT_INTERRUPTED
    return code if code >= 0 else 128 - code


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the launcher's flags and the trainer's arguments."""
    own, trainer = common.split(argv)
    parser = common.Parser(__doc__)
    parser.add_argument(
        '-n', '--processes', type=common.at_least(1), required=True, help='how many to start'
    )
    parser.add_argument(
        '--platform',
        choices=('cpu', 'cuda'),
        default='cpu',
        help='what the processes compute on (default: cpu)',
    )
    parser.add_argument(
        '--devices_per_process',
        type=common.at_least(1),
        default=1,
        help='virtual CPU devices, or GPUs, of each process (default: 1)',
    )
    parser.add_argument(
        '--command', default='', help='what to start in place of `python -m trainer.main`'
    )
    parser.add_argument(
        '--restarts',
        type=common.at_least(0),
        default=0,
        help='how often to start again after exit code 42 (default: 0)',
    )
    parser.add_argument(
        '--grace_secs',
        type=common.at_least(0),
        default=30,
        help='when one has ended with an error, the others are killed so much later (default: 30)',
    )
    parser.add_argument('--dry_run', action='store_true', help='print the commands only')
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
            print(common.shown(['env', *changed, *command]))
        return 0
    except (ValueError, OSError) as error:
        print(f'Error: {error}', file=sys.stderr)
        return common.EXIT_MISTAKE


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
