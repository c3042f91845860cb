# SPDX-License-Identifier: Apache-2.0
"""CPU time of a training step beside another checkout of this project.

    python tests/benchmarks/beside.py /path/to/other mlp --pairs=15
    python tests/benchmarks/beside.py /path/to/other mlp --passes

Both train in processes of their own, and run in turn: while one is measured, the other is stopped.
What counts is the CPU time of the whole process for each step: loop, input, rows and program. It
prints the median of the ratios (this checkout / the other) with its 90 % interval.

With `--passes` it counts the kernels of the compiled step that read or write an array of the shape
of the largest parameter: passes over it, its gradient and its optimizer state.
"""

from __future__ import annotations

import argparse
import collections
import math
import mmap
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = {'mlp': 'mnist_mlp.py', 'cnn': 'mnist.py', 'lm': 'lm.py:bytes'}
STEPS = struct.Struct('q')
INSTRUCTION = re.compile(r' +(?:ROOT )?%\S+ = (\S+) ([\w\-]+)\((.*?)\)')
KERNELS = ('fusion', 'copy', 'dot', 'custom-call', 'reduce', 'convolution')


def work(config: str, counter: str, overrides: list[str]) -> None:
    """Trains for ever, and counts the steps in a file."""
    from trainer.experiment import load_and_build
    from trainer.trainer import Trainer

    options = dict(pair.split('=', 1) for pair in overrides)
    made = load_and_build(
        config, train_for='1000000000 steps', evals={}, checkpoint__every='never', **options
    )
    trainer = Trainer(made)
    stepped = trainer.report.record_step
    with open(counter, 'r+b') as file:
        memory = mmap.mmap(file.fileno(), STEPS.size)

        def count(step: int) -> None:
            stepped(step)
            STEPS.pack_into(memory, 0, step)

        trainer.report.record_step = count  # type: ignore[method-assign]
        trainer.fit()


def count_passes(config: str) -> None:
    """Prints the number of such kernels, by kind."""
    import jax

    from trainer.experiment import load_and_build
    from trainer.trainer import Trainer

    trainer = Trainer(load_and_build(config, evals={}))
    largest = max(jax.tree.leaves(trainer.set_up().programs.abstract.params), key=lambda x: x.size)
    shape = f'f32[{",".join(map(str, largest.shape))}]'
    text = trainer.set_up().programs.step.executable().as_text()
    entry = text[text.index('ENTRY') :]
    # Where the shape of each value is, to know what a kernel reads.
    made = {m[1]: m[2] for m in re.finditer(r'%([\w.\-]+) = (\S+) ', entry)}
    kinds = collections.Counter()
    for line in re.findall(r'^ +(?:ROOT )?%[\w.\-]+ = .*$', entry, re.M):
        parts = INSTRUCTION.match(line)
        if parts is None:
            continue
        result, kind, operands = parts.groups()
        touched = [result, *(made.get(name, '') for name in re.findall(r'%([\w.\-]+)', operands))]
        if kind in KERNELS and any(x.startswith(shape) for x in touched):
            kinds[kind] += 1
    print(f'{sum(kinds.values())} passes over {shape}: {dict(kinds)}')


class Worker:
    """A checkout that trains, stopped but for its turns."""

    def __init__(self, tree: pathlib.Path, which: str, overrides: list[str]):
        self._counter = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._counter.write(STEPS.pack(0))
        self._counter.flush()
        command = [sys.executable, __file__, '--work', self._counter.name, which, *overrides]
        env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(tree)}
        self._process = subprocess.Popen(
            command, cwd=tree, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def read(self) -> tuple[int, float]:
        """Returns the steps so far and the CPU seconds that they took."""
        fields = pathlib.Path(f'/proc/{self._process.pid}/stat').read_text().rpartition(')')[2]
        ticks = sum(map(int, fields.split()[11:13]))
        steps = STEPS.unpack(pathlib.Path(self._counter.name).read_bytes())[0]
        return steps, ticks / os.sysconf('SC_CLK_TCK')

    def wait_for(self, steps: int) -> None:
        """Waits until it has warmed up."""
        while self.read()[0] < steps:
            if self._process.poll() is not None:
                raise SystemExit(self._process.communicate()[1].decode())
            time.sleep(0.1)

    def stop(self) -> None:
        """Lets it rest."""
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, secs: float, least: int) -> float:
        """Lets it run for a while, and returns the CPU seconds of a step."""
        self._process.send_signal(signal.SIGCONT)
        time.sleep(0.2)  # Caches of the processor.
        (step, cpu), until = self.read(), time.monotonic() + secs
        while time.monotonic() < until or self.read()[0] < step + least:
            time.sleep(0.05)
        later, used = self.read()
        self.stop()
        return (used - cpu) / (later - step)

    def end(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Returns the median and its 90 % interval, from the ranks of a binomial distribution."""
    ordered, n = sorted(ratios), len(ratios)
    below = np.cumsum([math.comb(n, k) / 2**n for k in range(n + 1)])
    rank = max(0, int(np.searchsorted(below, 0.05, side='right')) - 1)
    return float(np.median(ordered)), ordered[rank], ordered[n - 1 - rank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('other', type=pathlib.Path)
    parser.add_argument('which', choices=CONFIGS)
    parser.add_argument('overrides', nargs='*')
    parser.add_argument('--pairs', type=int, default=15)
    parser.add_argument('--secs', type=float, default=3.0)
    parser.add_argument('--steps', type=int, default=5, help='least number of steps in a turn')
    parser.add_argument('--passes', action='store_true')
    args = parser.parse_args()
    if args.passes:
        for tree in (ROOT, args.other.resolve()):
            env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(tree)}
            print(f'{tree}: ', end='', flush=True)
            command = [sys.executable, __file__, '--count', args.which]
            subprocess.run(command, cwd=tree, env=env, check=True)
        return
    workers = [Worker(tree, args.which, args.overrides) for tree in (ROOT, args.other.resolve())]
    try:
        for worker in workers:
            worker.wait_for(10)
            worker.stop()
        ratios = []
        for pair in range(args.pairs):
            order = workers if pair % 2 == 0 else workers[::-1]
            times = {worker: worker.turn(args.secs, args.steps) for worker in order}
            ratios.append(times[workers[0]] / times[workers[1]])
            print(f'pair {pair + 1}: {ratios[-1]:.3f}', flush=True)
        median, low, high = interval(ratios)
        print(f'{args.which}: {median:.3f} [{low:.3f}, {high:.3f}] of {args.pairs} pairs')
    finally:
        for worker in workers:
            worker.end()


if __name__ == '__main__':
    if sys.argv[1] == '--count':
        count_passes(f'configs/{CONFIGS[sys.argv[2]]}')
    elif sys.argv[1] == '--work':
        work(f'configs/{CONFIGS[sys.argv[3]]}', sys.argv[2], sys.argv[4:])
    else:
        main()
