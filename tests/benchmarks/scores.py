# SPDX-License-Identifier: Apache-2.0
"""What it costs to bring the predictions for a whole split to one host.

    python tests/benchmarks/scores.py [--examples=1000000] [--width=10] [--processes=4]

Evaluates the same split with and without a score, in several processes of one device each, and
prints the wall time of each evaluation, and the largest memory of the main process and of the
others.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def score(examples: Any) -> dict[str, float]:
    """Returns a number, so that only the transport costs."""
    return {'count': len(examples['values'])}


class Split:
    """Examples of one number each; what is predicted is wider."""

    def __init__(self, n: int):
        import numpy as np

        self.x = np.arange(n, dtype=np.float32)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def spec(self) -> dict[str, Any]:
        """Shape and dtype of each field, without the batch dimension."""
        from data.sources import ArraySpec

        return {'x': ArraySpec((), self.x.dtype)}

    def gather(self, indices: Any) -> dict[str, Any]:
        """Returns the examples with these indices."""
        return {'x': self.x[indices]}


class Task:
    """Predicts `width` numbers for each example."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, model: Any, batch: Any) -> Any:
        """Returns a loss for each example."""
        return model(batch['x'][:, None])[:, 0]

    def predict(self, model: Any, batch: Any) -> dict[str, Any]:
        """Returns float32 (examples, width)."""
        import jax.numpy as jnp

        values = model(batch['x'][:, None])
        return {'values': values * jnp.arange(1, self.width + 1, dtype=jnp.float32)}


def get_config(arg: str) -> Any:
    """Returns the config; its argument is 'examples,width,scored'."""
    import ml_collections

    examples, width, scored = arg.split(',')
    here = 'tests.benchmarks.scores'
    split = dict(target=f'{here}:Split', n=int(examples))
    evaluation = dict(data=dict(source=split, batch_size=8192), every='1 steps', final=False)
    if scored == 'yes':
        evaluation['score'] = dict(ref=f'{here}:score')
    return ml_collections.ConfigDict(
        dict(
            train_for='3 steps',
            model=dict(target='flax.linen:Dense', features=1),
            task=dict(target=f'{here}:Task', width=int(width)),
            data=dict(source=dict(target=f'{here}:Split', n=64), batch_size=8),
            optimizer=dict(target='optax:sgd', learning_rate=0.0),
            evals=dict(big=evaluation),
            hooks=dict(timer=dict(ref=f'{here}:report')),
        )
    )


_marks: list[float] = []


def report(event: Any) -> None:
    """Prints the time of the evaluations after the first one, and this process's peak memory."""
    if event.kind == 'eval':
        _marks.append(time.perf_counter())
    if event.kind == 'end':
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        secs = (_marks[-1] - _marks[0]) / (len(_marks) - 1)
        print('FIGURES', json.dumps({'secs': secs, 'peak_gib': peak}), file=sys.stderr)


def measure(args: argparse.Namespace, scored: str) -> tuple[float, float, float]:
    """Returns seconds of an evaluation, and GiB of the main process and of the largest other."""
    from tests.parallel import group

    config = f'--config={__file__}:{args.examples},{args.width},{scored}'
    with tempfile.TemporaryDirectory() as directory:
        running: list[subprocess.Popen[str]] = group.start(
            args.processes, pathlib.Path(directory) / 'run', config=(config,)
        )
        codes, _, errors = group.finish(running)
    if any(codes):
        raise SystemExit('\n'.join(errors))
    figures = [
        json.loads(line.removeprefix('FIGURES '))
        for text in errors
        for line in text.splitlines()
        if line.startswith('FIGURES ')
    ]
    peaks = [each['peak_gib'] for each in figures]
    return figures[0]['secs'], peaks[0], max(peaks[1:], default=0.0)


def main() -> None:
    """Measures both and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--examples', type=int, default=1_000_000)
    parser.add_argument('--width', type=int, default=10)
    parser.add_argument('--processes', type=int, default=4)
    args = parser.parse_args()
    for scored, label in (('no', 'metrics only'), ('yes', 'with a score')):
        secs, main_gib, other_gib = measure(args, scored)
        print(
            f'{label}: {secs:.2f} s for {args.examples:,} examples x {args.width} floats; '
            f'main process {main_gib:.2f} GiB, others at most {other_gib:.2f} GiB'
        )


if __name__ == '__main__':
    main()
