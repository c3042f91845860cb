# SPDX-License-Identifier: Apache-2.0
"""The trainer beside the hand-written loop, in turn, with the ratio of each pair.

    python tests/benchmarks/compare.py speed mlp [--pairs=15] [--steps=2000] [--config.key=value]
    python tests/benchmarks/compare.py speed cnn
    python tests/benchmarks/compare.py speed lm
    python tests/benchmarks/compare.py memory cnn
    python tests/benchmarks/compare.py start mlp        # process start to first step, cold and warm
    python tests/benchmarks/compare.py checkpoint       # the stall of a save, over a copy in memory
    python tests/benchmarks/compare.py input            # examples per second of the input pipeline

Machines are noisy: read the ratios, not the absolute figures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
STEPS = {'mlp': 2000, 'cnn': 400, 'lm': 150}
CONFIGS = {'mlp': 'configs/mnist_mlp.py', 'cnn': 'configs/mnist.py', 'lm': 'configs/lm.py:bytes'}


def main() -> None:
    """Runs the comparison that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument('what', choices=list(WHAT))
    parser.add_argument('model', nargs='?', default='mlp', choices=list(CONFIGS))
    parser.add_argument('--pairs', type=parse_count, default=5)
    parser.add_argument('--steps', type=parse_count)
    args, args.options = parser.parse_known_args()
    WHAT[args.what](args)


def parse_count(text: str) -> int:
    """Returns the number that an option gives; argparse prints the error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected a number of at least 1, got {text!r}')
    return int(text)


def summarize(ratios: list[float]) -> str:
    """Returns the median of some ratios, with their quartiles if there are two or more."""
    text = f'median ratio: {statistics.median(ratios):.3f}'
    if len(ratios) == 1:
        return f'{text}; quartiles need at least 2 pairs: --pairs=2'
    return f'{text}, quartiles ' + ' '.join(f'{q:.3f}' for q in statistics.quantiles(ratios))


def median_rate(run: Callable[[int], list[float]], steps: int) -> float:
    """Trains for some steps, and returns the median of the steps per second between log lines."""
    rates = run(steps)
    if not rates:
        raise SystemExit(f'--steps={steps} is too few: no two log lines follow each other')
    return statistics.median(rates)


def speed(args: argparse.Namespace) -> None:
    """Steps per second, in one process: some steps of the one loop, then some of the other.

    Machines that are shared change their speed from one second to the next; what is compared lies
    close together.
    """
    from tests.benchmarks.handwritten import Loop

    steps = args.steps or STEPS[args.model]
    by_hand = Loop(args.model)
    ratios = []
    with tempfile.TemporaryDirectory() as workdir:
        run = trainer_loop(args, workdir)
        for pair in range(-1, args.pairs):
            hand, ours = median_rate(by_hand.run, steps), median_rate(run, steps)
            if pair >= 0:  # The first one also compiles.
                ratios.append(ours / hand)
                rates = f'by hand {hand:.4g} steps/s, trainer {ours:.4g} steps/s'
                print(f'{args.model}: {rates}, ratio {ratios[-1]:.2f}', flush=True)
    print(summarize(ratios))


def trainer_loop(args: argparse.Namespace, workdir: str) -> Callable[[int], list[float]]:
    """Returns a function that trains for some steps and returns their rates.

    Logs, event files, accumulated metrics, norms and prefetch are on; what the other loop has
    nothing like is off: evaluations, and checkpoints, which have a comparison of their own.
    """
    from trainer.config import loading, overrides
    from trainer.experiment import build
    from trainer.trainer import Trainer

    loaded = loading.load(CONFIGS[args.model])
    given = [option.removeprefix('--config.').partition('=') for option in args.options]
    fixed = [('train_for', '100000000 steps'), ('evals', '{}'), ('checkpoint.every', 'never')]
    overrides.apply(loaded.config, fixed + [(path, text) for path, _, text in given])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(build(loaded), workdir)
    rows = pathlib.Path(workdir) / 'metrics.jsonl'

    def run(steps: int) -> list[float]:
        seen = rows.stat().st_size if rows.exists() else 0
        trainer.fit(max_steps=steps)
        lines = [json.loads(line) for line in rows.read_bytes()[seen:].splitlines()]
        # Not the first: its steps wait for the first batch.
        return [line['train/steps_per_sec'] for line in lines][1:]

    return run


def memory(args: argparse.Namespace) -> None:
    """Peak memory of the processes."""
    ratios = []
    steps = args.steps or 2 * STEPS[args.model]
    for _ in range(args.pairs):
        by_hand = handwritten(args.model, steps)
        ours = run_trainer(args.model, steps, *args.options)
        ratios.append(ours['peak_mb'] / by_hand['peak_mb'])
        both = f'by hand {by_hand["peak_mb"]:.0f} MB, trainer {ours["peak_mb"]:.0f} MB'
        print(f'{args.model}: {both}, ratio {ratios[-1]:.2f}', flush=True)
    print(f'median ratio: {statistics.median(ratios):.2f}')


def start(args: argparse.Namespace) -> None:
    """Process start to first finished step, with an empty compile cache and with a warm one."""
    for kind in ('cold', 'warm'):
        ratios = []
        with tempfile.TemporaryDirectory() as warm:
            if kind == 'warm':
                handwritten(args.model, 1, cache=f'{warm}/hand')
                run_trainer(args.model, 1, '--config.log.every=1steps', cache=f'{warm}/ours')
            for i in range(args.pairs):
                names = [f'{warm}/{side}{i if kind == "cold" else ""}' for side in ('hand', 'ours')]
                by_hand = handwritten(args.model, 1, cache=names[0])
                ours = run_trainer(args.model, 1, '--config.log.every=1steps', cache=names[1])
                ratios.append(ours['first_step_secs'] / by_hand['first_step_secs'])
                print(
                    f'{args.model} {kind}: by hand {by_hand["first_step_secs"]:.2f} s, '
                    f'trainer {ours["first_step_secs"]:.2f} s, ratio {ratios[-1]:.2f}',
                    flush=True,
                )
        print(f'median ratio, {kind} cache: {statistics.median(ratios):.2f}')


def checkpoint(args: argparse.Namespace) -> None:
    """The stall of `save()` and of the slowest of the next steps, over a copy of the state."""
    import jax
    import jax.numpy as jnp

    from trainer.checkpoint.manager import Checkpoints, Retention

    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0.999, state), donate_argnums=0)
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    for megabytes in (50, 1000):
        leaves = 10
        size = megabytes * 10**6 // 4 // leaves
        state = {str(i): jnp.full((size,), float(i)) for i in range(leaves)}
        ratios = []
        with tempfile.TemporaryDirectory() as directory:
            checkpoints = Checkpoints(directory, Retention(keep_last=1))
            for trial in range(args.pairs + 1):
                jax.block_until_ready(copy(state))
                copied, _ = _measure_secs(copy, state)
                idle = []
                for _ in range(5):
                    secs, state = _measure_secs(step, state)
                    idle.append(secs)
                saved, _ = _measure_secs(checkpoints.save, trial, state, {})
                after = []
                for _ in range(5):
                    secs, state = _measure_secs(step, state)
                    after.append(secs)
                checkpoints.wait()
                if not trial:  # The first save also imports Orbax and compiles.
                    continue
                stall = saved + max(after) - statistics.median(idle)
                ratios.append(stall / copied)
                print(
                    f'{megabytes} MB: copy {copied:.3f} s, save() {saved:.3f} s, idle step '
                    f'{statistics.median(idle):.3f} s, slowest step after {max(after):.3f} s, '
                    f'stall / copy {ratios[-1]:.2f}',
                    flush=True,
                )
            checkpoints.close()
        print(f'median stall / copy, {megabytes} MB: {statistics.median(ratios):.2f}')


def _measure_secs(fn: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    import jax

    began = time.perf_counter()
    result = jax.block_until_ready(fn(*args))
    return time.perf_counter() - began, result


def input_(args: argparse.Namespace) -> None:
    """Examples per second of the loader over those of a bare numpy gather."""
    import numpy as np

    from trainer.data.loader import TrainLoader
    from trainer.data.mnist import MNIST

    source = MNIST('train')
    loader = TrainLoader(source=source, batch_size=256)
    images = source.gather(np.arange(len(source)))['image']
    labels = source.gather(np.arange(len(source)))['label']
    order = np.random.default_rng(0).permutation(len(images))
    for _ in range(args.pairs):
        began = time.perf_counter()
        for step in range(200):
            rows = order[step * 256 % 59_000 :][:256]
            (images[rows], labels[rows])
        bare = 200 * 256 / (time.perf_counter() - began)
        began = time.perf_counter()
        for step in range(0, 200, 5):
            loader.block(step, 5)
        ours = 200 * 256 / (time.perf_counter() - began)
        print(f'numpy gather {bare:,.0f}/s, loader {ours:,.0f}/s, ratio {ours / bare:.2f}')


def handwritten(model: str, steps: int, cache: str | None = None) -> dict[str, Any]:
    """Returns the figures of the hand-written loop."""
    options = [] if cache is None else [f'--cache={cache}']
    script = str(ROOT / 'tests/benchmarks/handwritten.py')
    return json.loads(_run([script, model, f'--steps={steps}', *options]).splitlines()[-1])


def run_trainer(model: str, steps: int, *options: str, cache: str | None = None) -> dict[str, Any]:
    """Returns the figures of the trainer, with logs, checkpoints and event files on."""
    with tempfile.TemporaryDirectory() as workdir:
        out = _run(
            [
                '-m',
                'trainer.main',
                f'--config={CONFIGS[model]}',
                f'--workdir={workdir}',
                f'--config.train_for={steps}steps',
                '--config.evals.test.final=false',
                '--config.hooks={"m": {"ref": "tests.benchmarks.first_step:measure"}}',
                *options,
            ],
            cache,
        )
        figures = json.loads(out.split('FIGURES ')[1].splitlines()[0])
        lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
        rates = [json.loads(line).get('train/steps_per_sec') for line in lines][1:]
        figures['steps_per_sec'] = statistics.median([r for r in rates if r] or [0.0])
        return figures


def _run(arguments: list[str], cache: str | None = None) -> str:
    environment = {**os.environ, 'BENCHMARK_BEGAN': repr(time.time()), 'PYTHONPATH': str(ROOT)}
    if cache is not None:
        environment['JAX_COMPILATION_CACHE_DIR'] = cache
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


WHAT: dict[str, Callable[[argparse.Namespace], None]] = {
    'speed': speed,
    'memory': memory,
    'start': start,
    'checkpoint': checkpoint,
    'input': input_,
}


if __name__ == '__main__':
    main()
