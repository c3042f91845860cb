# SPDX-License-Identifier: Apache-2.0
"""launch/gke.py: the manifest, read by a YAML parser."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from tests import command

yaml = pytest.importorskip('yaml')

LAUNCHER = command.ROOT / 'launch' / 'gke.py'
TPU = ('run', '--image=i', '--tpu=tpu-v5-lite-podslice', '--topology=4x4')
GPU = ('run', '--image=i', '--gpu=nvidia-h100-80gb', '--nodes=2')
TRAINER = ('--', '--config=configs/mnist.py', '--workdir=gs://bucket/run')


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, LAUNCHER, *arguments], capture_output=True, text=True)


def jobset(*arguments: str) -> dict[str, Any]:
    done = launch(*arguments)
    assert (done.returncode, done.stderr) == (0, '')
    return yaml.safe_load(done.stdout)


def job(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest['spec']['replicatedJobs'][0]['template']['spec']


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return job(manifest)['template']['spec']


def test_tpu_slice_has_one_pod_per_host() -> None:
    manifest = jobset(*TPU, '--slices=2', *TRAINER)
    assert manifest['spec']['replicatedJobs'][0]['replicas'] == 2
    assert (job(manifest)['parallelism'], job(manifest)['completions']) == (4, 4)
    assert manifest['metadata']['annotations'] == {
        'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'
    }
    assert pod(manifest)['nodeSelector'] == {
        'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
        'cloud.google.com/gke-tpu-topology': '4x4',
    }
    (container,) = pod(manifest)['containers']
    assert container['resources'] == {'limits': {'google.com/tpu': 4}}
    assert container['command'] == ['python', '-m', 'trainer.main']
    # GKE gives TPU pods the addresses of the others.
    assert container['args'] == list(TRAINER[1:])


@pytest.mark.parametrize(
    ('topology', 'flags', 'hosts', 'chips'),
    [
        ('1x1', (), 1, 1),
        ('2x2', (), 1, 4),
        ('2x4', ('--chips_per_host=8',), 1, 8),
        ('4x4x4', (), 16, 4),
    ],
)
def test_hosts_and_chips(topology: str, flags: tuple[str, ...], hosts: int, chips: int) -> None:
    manifest = jobset(
        'run', '--image=i', '--tpu=tpu-v5p-slice', f'--topology={topology}', *flags, *TRAINER
    )
    assert job(manifest)['parallelism'] == hosts
    limits = pod(manifest)['containers'][0]['resources']['limits']
    assert limits == {'google.com/tpu': chips}


def test_gpu_pods_use_the_first_pod_as_coordinator() -> None:
    manifest = jobset(*GPU, '--gpus_per_node=4', *TRAINER)
    assert (job(manifest)['parallelism'], job(manifest)['completionMode']) == (2, 'Indexed')
    assert pod(manifest)['nodeSelector'] == {'cloud.google.com/gke-accelerator': 'nvidia-h100-80gb'}
    (container,) = pod(manifest)['containers']
    assert container['resources'] == {'limits': {'nvidia.com/gpu': 4}}
    assert container['args'][-3:] == [
        '--coordinator=run-workers-0-0.run:8476',
        '--num_processes=2',
        '--process_id=$(JOB_COMPLETION_INDEX)',
    ]
    assert 'annotations' not in manifest['metadata']


def test_restart_rules_by_exit_code() -> None:
    manifest = jobset(*GPU, '--restarts=7', *TRAINER)
    assert manifest['spec']['failurePolicy'] == {
        'maxRestarts': 7,
        'rules': [{'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}],
    }
    assert job(manifest)['backoffLimit'] == 0
    assert job(manifest)['podFailurePolicy']['rules'] == [
        {'action': 'FailJob', 'onExitCodes': {'operator': 'In', 'values': [2, 65]}},
        {'action': 'Ignore', 'onExitCodes': {'operator': 'In', 'values': [42]}},
        {'action': 'Ignore', 'onPodConditions': [{'type': 'DisruptionTarget'}]},
    ]
    # Kubernetes requires it for a podFailurePolicy.
    assert pod(manifest)['restartPolicy'] == 'Never'


def test_grace_period_is_longer_than_a_save() -> None:
    assert pod(jobset(*TPU, *TRAINER))['terminationGracePeriodSeconds'] == 150
    slow = jobset(*TPU, '--save_secs=600', *TRAINER)
    assert pod(slow)['terminationGracePeriodSeconds'] == 630


def test_shared_volume_service_account_and_spot_nodes() -> None:
    flags = ('--volume=claim:/shared', '--service_account=a', '--spot')
    spec = pod(jobset(*GPU, *flags, '--', '--config=a.py', '--workdir=/shared/run'))
    claim = {'name': 'shared', 'persistentVolumeClaim': {'claimName': 'claim'}}
    assert claim in spec['volumes']
    mounts = spec['containers'][0]['volumeMounts']
    assert {'name': 'shared', 'mountPath': '/shared'} in mounts
    assert {volume['name'] for volume in spec['volumes']} == {m['name'] for m in mounts}
    assert spec['serviceAccountName'] == 'a'
    assert spec['nodeSelector']['cloud.google.com/gke-spot'] == 'true'
    assert spec['tolerations'][0]['key'] == 'cloud.google.com/gke-spot'


def test_trainer_arguments_are_unchanged() -> None:
    odd = ['--config=a: b.py', '--workdir=gs://b/a', '--config.x={"y": [1, "#"]}', 'ä\n', '', 'no']
    args = pod(jobset(*TPU, '--', *odd, '--config.z=$(HOME)'))['containers'][0]['args']
    # Kubernetes replaces two dollar signs by one.
    assert args == [*odd, '--config.z=$$(HOME)']


@pytest.mark.parametrize(
    'value',
    [
        {'a': {'b': [{'c': 1, 'd': [[1, 2], [{'e': 'f'}]]}, 'g']}},
        ['yes', 'No', '1', 'null', '~', '- a', 'a: b', '#', '', '1e3', '0x1', 'é', '2001-01-01'],
        {'on': True, 'empty': {}, 'none': None, 'list': []},
    ],
)
def test_yaml_round_trip(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LAUNCHER.parent))
    spec = importlib.util.spec_from_file_location('launch_gke', LAUNCHER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert yaml.safe_load(module.yaml(value)) == value


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ([*TPU], 'come after `--`'),
        (['run', '--image=i', *TRAINER], 'expected one of --tpu=... and --gpu=...'),
        ([*TPU, '--gpu=a', *TRAINER], 'expected one of --tpu=... and --gpu=...'),
        (['Run_1', *GPU[1:], *TRAINER], "'Run_1': expected a name"),
        (['a' * 41, *GPU[1:], *TRAINER], 'at most 40'),
        ([*TPU[:-1], *TRAINER], '--topology=None: expected the shape'),
        ([*TPU[:-1], '--topology=3x3', *TRAINER], 'which is not a multiple of --chips_per_host=4'),
        ([*GPU, '--volume=claim', *TRAINER], '--volume=claim: expected CLAIM:/PATH'),
        ([*GPU, '--', '--config=a'], "--workdir=: a pod's disk is deleted with the pod"),
        ([*GPU, '--volume=c:/a', '--', '--config=a', '--workdir=/ab'], '--workdir=/ab: a pod'),
    ],
)
def test_invalid_flags_are_rejected(arguments: list[str], expected: str) -> None:
    done = launch(*arguments)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('Error: ') and expected in done.stderr
