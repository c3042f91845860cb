# SPDX-License-Identifier: Apache-2.0
"""How the cost of a step grows with the number of devices, as a table for docs/benchmarks.md.

    python tests/benchmarks/plan_table.py [--devices=1,8,64,256,512]

A transformer of 1.1 billion parameters, one sequence of 1,024 tokens on each device, parameters cut
over up to 8 devices. Each row is one `--mode=plan` in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = (
    '{"vocab_size": 32768, "layers": 20, "width": 2048, "heads": 16, "max_length": 1024, '
    '"scan_layers": true, "remat": "full"}'
)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--devices', default='1,8,64,256,512')
    counts = [int(count) for count in parser.parse_args().devices.split(',')]
    print(
        '| devices | mesh | state on each | sent by each in a step | compiled in | all | memory |'
    )
    print('|---|---|---|---|---|---|---|')
    for count in counts:
        fsdp = min(8, count)
        began = time.monotonic()
        text = plan(count, {'data': count // fsdp, 'fsdp': fsdp})
        secs = time.monotonic() - began
        # Of the largest child so far; the rows grow.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        state = first_group(r'train state +(\S+ \S+) per device', text)
        sent = first_group(r'Each device sends (\S+ \S+)', text) or 'nothing'
        compiled = first_group(r'Compiled in (\S+ s)', text)
        mesh = f'data {count // fsdp} x fsdp {fsdp}'
        print(
            f'| {count} | {mesh} | {state} | {sent} | {compiled} | {secs:.0f} s | {peak:.1f} GiB |'
        )


def plan(devices: int, mesh: dict[str, int]) -> str:
    """Returns what `--mode=plan` prints."""
    sizes = ', '.join(f'"{name}": {size}' for name, size in mesh.items())
    arguments = [
        '--config=configs/lm.py:bytes',
        '--mode=plan',
        f'--devices={devices}',
        f'--config.model={MODEL}',
        '--config.data.source.seq_len=1024',
        f'--config.data.batch_size={devices}',
        f'--config.mesh={{{sizes}}}',
    ]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    command = [sys.executable, '-m', 'trainer.main', *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def first_group(pattern: str, text: str) -> str:
    """Returns the pattern's group, '' if it is not there."""
    match = re.search(pattern, text)
    return match[1] if match else ''


if __name__ == '__main__':
    main()
