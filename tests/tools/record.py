# SPDX-License-Identifier: Apache-2.0
"""Records what short runs compute, to show that a change of the code has changed no number.

    python tests/tools/record.py /path/to/checkout before.json
    python tests/tools/record.py . after.json
    python tests/tools/record.py --compare before.json after.json

It trains each shipped config and some variants for 20 steps, with evaluations, as commands of their
own, and keeps how they ended: exit code, digests of state and data, rows, and which files and keys
the work directory has. Compare recordings of one machine and one version of JAX: other compilers
round differently. `--only=NAME` (several times) records a part.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

# How the names of values end that depend on the clock.
CLOCK = ('_per_sec', '_wait_secs')
EVENTS = (
    'train_for=20steps',
    'log.every=5steps',
    'checkpoint.every=10steps',
)
MNIST = ('data.source.limit=2000', 'evals.test.data.source.limit=500', 'evals.test.every=10steps')
TEXT = ('model.layers=2', 'model.width=32', 'evals.test.every=10steps')
STEP = '''
def step(state, batch, ctx):
    """Two updates with one batch."""
    grads, collections, metrics = ctx.gradients(state, batch)
    state, more = ctx.update(state, grads, collections)
    grads, collections, _ = ctx.gradients(state, batch)
    state, more = ctx.update(state, grads, collections)
    return state, {**metrics, **more}
'''
GROUPS = {
    'kernels': {'target': 'optax:adamw', 'learning_rate': 0.001, 'params': '.*/kernel'},
    'rest': {'target': 'optax:sgd', 'learning_rate': 0.01, 'params': '.*/bias'},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run to record.

    Attributes:
        config: its name in `configs/`.
        overrides: 'key=value' of the config.
        devices: virtual CPU devices of each process.
        processes: how many.
    """

    config: str
    overrides: tuple[str, ...] = ()
    devices: int = 1
    processes: int = 1


def mlp(*overrides: str, **options: int) -> Run:
    """Returns a variant of the MLP."""
    return Run('mnist_mlp', (*MNIST, *overrides), **options)


def cnn(*overrides: str, **options: int) -> Run:
    """Returns a variant of the small convolutional network."""
    return Run('mnist', (*MNIST, *overrides), **options)


RUNS = {
    'addition': Run(
        'addition',
        (
            'model.hidden=16', 'evals.held_out.every=10steps', 'data.batch_size=32',
            'evals.teacher_forced.every=never', 'evals.teacher_forced.final=False',
        ),
    ),
    'lm': Run('lm:bytes', (*TEXT, 'evals.test.data.source.limit=64')),
    'lm_packed': Run('lm_packed', TEXT),
    'mnist': cnn(),
    'mnist_ensemble': Run('mnist_ensemble', MNIST),
    'mnist_mlp': mlp(),
    'mnist_nnx': Run('mnist_nnx', MNIST),
    'mnist_resnet': Run(
        'mnist_resnet',
        (
            *MNIST, 'evals.test_ema.data.source.limit=500', 'evals.test_ema.every=10steps',
            'model.features=8', 'data.batch_size=32',
        ),
    ),
    'tagging': Run(
        'tagging',
        (
            'model.hidden=8', 'data.source.items.limit=200', 'evals.dev.every=10steps',
            'evals.dev.data.source.items.limit=40', 'evals.test.data.source.items.limit=40',
        ),
    ),
    'vae': Run('vae', (*MNIST, 'model.hidden=16')),
    'accumulate': mlp('accumulate=4'),
    'bfloat16': cnn('precision.compute=bfloat16'),
    'clip and freeze': mlp('optimizer.clip_norm=0.5', 'optimizer.freeze=Dense_0/bias'),
    'custom step': mlp('step={"ref": "recorded_step:step"}'),
    'dropout and batch norm': mlp('model.dropout_rate=0.2', 'model.batch_norm=true'),
    'eight devices': cnn('sharding=fsdp', 'mesh={"data": 2, "fsdp": 4}', devices=8),
    'ema': mlp('ema.decay=0.9', 'evals.test.ema=true'),
    'float16': mlp('precision.compute=float16', 'precision.loss_scale=32768.0'),
    'fused': mlp('steps_per_call=5'),
    'groups': mlp('optimizer={}', 'optimizer.groups=' + json.dumps(GROUPS)),
    'two processes': mlp(processes=2),
    'vary': mlp(
        'ensemble={"size": 2, "vary": {"optimizer": {"learning_rate": (0.01, 0.03)}}}',
    ),
}  # fmt: skip


def record(tree: pathlib.Path, run: Run) -> dict[str, Any]:
    """Trains, and returns how the run ended and what it has written."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / 'run'
        (pathlib.Path(folder) / 'recorded_step.py').write_text(STEP)
        flags = [f'--config.{text}' for text in (*EVENTS, *run.overrides)]
        command = [sys.executable, '-m', 'trainer.main', f'--config={run.config}']
        command += [*flags, f'--workdir={workdir}']
        env = {
            **os.environ,
            'JAX_PLATFORMS': 'cpu',
            'PYTHONPATH': f'{tree}:{folder}',
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={run.devices}',
            # As users compile.
            'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',
        }
        started = [
            subprocess.Popen(
                [*command, *flags], cwd=tree, env=env, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )
            for flags in together(run.processes)
        ]  # fmt: skip
        errors = [process.communicate()[1] for process in started]
        codes = [process.returncode for process in started]
        if any(codes):
            print(*errors, sep='\n', file=sys.stderr)
        return {'codes': codes, **read_run(workdir)}


def together(processes: int) -> list[list[str]]:
    """Returns the flags of each process of a run."""
    if processes == 1:
        return [[]]
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    common = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}']
    return [[*common, f'--process_id={number}'] for number in range(processes)]


def read_run(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns what a run has written, without what depends on the clock or the machine."""
    found: dict[str, Any] = {}
    if (workdir / 'result.json').exists():
        result = json.loads((workdir / 'result.json').read_text())
        found['result'] = {**result, 'metrics': steady(result['metrics'])}
    if (workdir / 'metrics.jsonl').exists():
        found['rows'] = [steady(json.loads(line)) for line in (workdir / 'metrics.jsonl').open()]
    names = {name(path) for path in workdir.iterdir()} if workdir.exists() else set()
    # Whose code it was does not count.
    found['files'] = sorted(names - {'code.diff'})
    for file in ('run.json', *(f'checkpoints/{step}/meta/metadata' for step in (10, 20))):
        if (workdir / file).exists():
            content = json.loads((workdir / file).read_text())
            found[f'keys of {file}'] = sorted(content)
    return found


def steady(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that do not depend on the clock."""
    return {key: value for key, value in values.items() if not key.endswith(CLOCK)}


def name(path: pathlib.Path) -> str:
    """Returns the name of a file without the host and the time in it."""
    return 'events' if path.name.startswith('events.') else path.name


def differences(before: Any, after: Any, path: str = '') -> Iterator[str]:
    """Yields a line for each value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            if key not in before or key not in after:
                yield f'{path}/{key}: only {"after" if key in after else "before"}'
            else:
                yield from differences(before[key], after[key], f'{path}/{key}')
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f'{path}[{index}]')
    elif before != after:
        yield f'{path}: {before!r} -> {after!r}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('first', help='a checkout, or with --compare a recording')
    parser.add_argument('second', help='where the recording goes, or another one')
    parser.add_argument('--compare', action='store_true')
    parser.add_argument('--only', action='append', choices=RUNS)
    args = parser.parse_args()
    if args.compare:
        before, after = (
            json.loads(pathlib.Path(file).read_text()) for file in (args.first, args.second)
        )
        found = list(differences(before, after))
        print(*found, f'{len(before)} runs, {len(found)} differences', sep='\n')
        return int(bool(found))
    recorded = {}
    for key in args.only or RUNS:
        recorded[key] = record(pathlib.Path(args.first).resolve(), RUNS[key])
        result = recorded[key].get('result', {})
        print(f'{key}: {recorded[key]["codes"]} {result.get("digest")}', flush=True)
    pathlib.Path(args.second).write_text(json.dumps(recorded, indent=1))
    return 0


if __name__ == '__main__':
    sys.exit(main())
