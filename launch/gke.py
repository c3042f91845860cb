#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints a JobSet for Google Kubernetes Engine; needs JobSet 0.6 or newer on the cluster.

  launch/gke.py run-1 --image=IMAGE --tpu=tpu-v5-lite-podslice --topology=4x4 \\
      -- --config=configs/mnist.py --workdir=gs://bucket/run-1 | kubectl apply -f -
  launch/gke.py run-2 --image=IMAGE --gpu=nvidia-h100-80gb --nodes=2 --gpus_per_node=8 \\
      --volume=claim:/shared -- --config=configs/mnist.py --workdir=/shared/run-2

One pod runs on each host. If a pod is evicted, the run saves, and all pods exit with code 42. They
are replaced, which does not count as a failure. After any other failure the whole JobSet restarts,
up to --restarts times, except for a usage error (2) or a corrupt checkpoint (65), which end it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import common

_JOB = 'workers'


def manifest(args: argparse.Namespace, trainer: Sequence[str]) -> dict[str, Any]:
    """Returns the JobSet as a tree of dicts and lists."""
    job = {
        'parallelism': args.hosts,
        'completions': args.hosts,
        # Each pod gets an index, which is the id of its process, and a stable host name.
        'completionMode': 'Indexed',
        # One failed pod fails the job: the processes of a run cannot continue without it.
        'backoffLimit': 0,
        'podFailurePolicy': {
            # The first rule that matches counts.
            'rules': [
                _exit_code_rule('FailJob', common.EXIT_MISTAKE, common.EXIT_CORRUPT),
                _exit_code_rule('Ignore', common.EXIT_PREEMPTED),
                {'action': 'Ignore', 'onPodConditions': [{'type': 'DisruptionTarget'}]},
            ]
        },
        'template': {'spec': _pod(args, trainer)},
    }
    metadata: dict[str, Any] = {'name': args.name}
    if args.tpu:
        # Schedules each job of the set on its own TPU slice.
        metadata['annotations'] = {
            'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'
        }
    return {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2',
        'kind': 'JobSet',
        'metadata': metadata,
        'spec': {
            'failurePolicy': {
                'maxRestarts': args.restarts,
                # A job that its podFailurePolicy has failed would fail again.
                'rules': [
                    {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']},
                ],
            },
            'replicatedJobs': [{'name': _JOB, 'replicas': args.slices, 'template': {'spec': job}}],
        },
    }


def _exit_code_rule(action: str, *codes: int) -> dict[str, Any]:
    return {'action': action, 'onExitCodes': {'operator': 'In', 'values': list(codes)}}


def _pod(args: argparse.Namespace, trainer: Sequence[str]) -> dict[str, Any]:
    selector = {'cloud.google.com/gke-accelerator': args.gpu}
    if args.tpu:
        selector = {
            'cloud.google.com/gke-tpu-accelerator': args.tpu,
            'cloud.google.com/gke-tpu-topology': args.topology,
        }
    # Kubernetes requires 'Never' for a podFailurePolicy.
    spec: dict[str, Any] = {'restartPolicy': 'Never'}
    if args.spot:
        selector['cloud.google.com/gke-spot'] = 'true'
        spec['tolerations'] = [
            {'key': 'cloud.google.com/gke-spot', 'operator': 'Exists', 'effect': 'NoSchedule'}
        ]
    if args.service_account:
        spec['serviceAccountName'] = args.service_account
    # NCCL and data workers use shared memory; a container has 64 MB of it by default.
    volumes = [{'name': 'shm', 'emptyDir': {'medium': 'Memory'}}]
    mounts = [{'name': 'shm', 'mountPath': '/dev/shm'}]
    if args.volume:
        claim, path = args.volume
        volumes.append({'name': 'shared', 'persistentVolumeClaim': {'claimName': claim}})
        mounts.append({'name': 'shared', 'mountPath': path})
    container = {
        'name': 'trainer',
        'image': args.image,
        'command': ['python', '-m', 'trainer.main'],
        'args': [*map(_escape, trainer), *_cluster(args)],
        'resources': {'limits': _limits(args)},
        'volumeMounts': mounts,
    }
    return {
        **spec,
        'nodeSelector': selector,
        # Longer than a save takes; otherwise the pod would be killed in the middle of it.
        'terminationGracePeriodSeconds': args.save_secs + 30,
        'containers': [container],
        'volumes': volumes,
    }


def _limits(args: argparse.Namespace) -> dict[str, int]:
    if args.tpu:
        return {'google.com/tpu': args.chips_per_host}
    return {'nvidia.com/gpu': args.gpus_per_node}


def _cluster(args: argparse.Namespace) -> list[str]:
    """Returns the flags with which the processes of a run connect to each other."""
    # On TPUs, GKE sets the addresses in the environment of each pod. Otherwise the coordinator is
    # the first pod, whose host name is known from the names of JobSet and job.
    if args.tpu or args.hosts == 1:
        return []
    first = f'{args.name}-{_JOB}-0-0.{args.name}'
    return [
        f'--coordinator={first}:{common.COORDINATOR_PORT}',
        f'--num_processes={args.hosts}',
        '--process_id=$(JOB_COMPLETION_INDEX)',
    ]


def _escape(argument: str) -> str:
    """Escapes `$(NAME)` in an argument, which Kubernetes would expand."""
    return argument.replace('$(', '$$(')


def yaml(value: Any, indent: str = '') -> str:
    """Returns a tree of dicts, lists, strings and numbers as block-style YAML."""
    if isinstance(value, Mapping) and value:
        return ''.join(f'{indent}{_scalar(k)}:{_yaml_value(v, indent)}' for k, v in value.items())
    if isinstance(value, list) and value:
        # The first line of an item follows its dash.
        items = (yaml(item, f'{indent}  ') for item in value)
        return ''.join(f'{indent}- {item[len(indent) + 2 :]}' for item in items)
    return f'{indent}{_scalar(value)}\n'


def _yaml_value(value: Any, indent: str) -> str:
    if isinstance(value, Mapping | list) and value:
        return '\n' + yaml(value, f'{indent}  ')
    return f' {_scalar(value)}\n'


def _scalar(value: Any) -> str:
    # Strings that YAML could parse as something else are quoted as in JSON, a subset of YAML.
    plain = isinstance(value, str) and re.fullmatch(r'[A-Za-z/][A-Za-z0-9_./-]*', value)
    if plain and value.lower() not in ('true', 'false', 'null', 'yes', 'no', 'on', 'off', 'y', 'n'):
        return value
    return json.dumps(value)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the launcher's flags and the trainer's arguments, both checked."""
    own, trainer = common.split_arguments(argv)
    parser = common.Parser(__doc__)
    positive = common.int_at_least(1)
    add = parser.add_argument
    add('name', help='name of the JobSet')
    add('--image', required=True, help='container image in which `python -m trainer.main` runs')
    add('--tpu', help='TPU type of the node pool, such as tpu-v5-lite-podslice')
    add('--topology', help='topology of a TPU slice, such as 4x4')
    add('--chips_per_host', type=positive, help='TPU chips of a host (default: 4, or all if fewer)')
    add('--slices', type=positive, default=1, help='number of TPU slices (default: 1)')
    add('--gpu', help='GPU type of the node pool, such as nvidia-h100-80gb')
    add('--nodes', type=positive, default=1, help='number of nodes with GPUs (default: 1)')
    add('--gpus_per_node', type=positive, default=8, help='GPUs of a node (default: 8)')
    add('--spot', action='store_true', help='use Spot nodes, which leave little time to save')
    add('--volume', help='CLAIM:PATH of a volume that all pods share')
    add('--service_account', help='Kubernetes service account, for access to gs://')
    add('--save_secs', type=positive, default=120, help='maximum seconds of a save (default: 120)')
    add(
        '--restarts',
        type=common.int_at_least(0),
        default=10,
        help='maximum number of restarts after failures (default: 10)',
    )
    args = parser.parse_args(own)
    _check(parser, args, trainer)
    return args, trainer


def _check(parser: common.Parser, args: argparse.Namespace, trainer: Sequence[str]) -> None:
    common.check_trainer(parser, trainer)
    if bool(args.tpu) == bool(args.gpu):
        parser.error('expected one of --tpu=... and --gpu=...')
    # A host name has at most 63 characters, and it contains the name of the job and two numbers.
    if not re.fullmatch(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?', args.name):
        parser.error(
            f'{args.name!r}: expected a name of at most 40 lowercase letters, digits and dashes'
        )
    args.hosts = _hosts(parser, args) if args.tpu else args.nodes
    if args.volume:
        claim, _, path = args.volume.partition(':')
        if not claim or not path.startswith('/'):
            parser.error(f'--volume={args.volume}: expected CLAIM:/PATH')
        args.volume = (claim, path)
    workdir = common.flag_value(trainer, 'workdir') or ''
    shared = f'{args.volume[1].rstrip("/")}/' if args.volume else None
    if not workdir.startswith('gs://') and not (shared and workdir.startswith(shared)):
        parser.error(
            f"--workdir={workdir}: a pod's disk is deleted with the pod; expected gs://bucket/... "
            'or a directory of --volume'
        )


def _hosts(parser: common.Parser, args: argparse.Namespace) -> int:
    """Returns the number of hosts of a TPU slice."""
    if not re.fullmatch(r'\d+x\d+(x\d+)?', args.topology or ''):
        parser.error(f'--topology={args.topology}: expected the shape of a slice, such as 4x4')
    chips = math.prod(map(int, args.topology.split('x')))
    args.chips_per_host = args.chips_per_host or min(4, chips)
    if not chips or chips % args.chips_per_host:
        parser.error(
            f'--topology={args.topology} has {chips} chips, which is not a multiple of '
            f'--chips_per_host={args.chips_per_host}'
        )
    return chips // args.chips_per_host


def main(argv: Sequence[str]) -> int:
    """Prints the manifest and returns the exit code."""
    print(yaml(manifest(*parse(argv))), end='')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
