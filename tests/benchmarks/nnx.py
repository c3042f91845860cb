# SPDX-License-Identifier: Apache-2.0
"""NNX beside Linen in the same trainer: the same network, in turn, in one process.

    python tests/benchmarks/nnx.py mlp [--pairs=15] [--steps=2000]
    python tests/benchmarks/nnx.py cnn

Machines are noisy: read the median ratio.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODELS = {'mlp': 'trainer.models.mlp_nnx:MLP', 'cnn': 'trainer.models.cnn_nnx:CNN'}


def main() -> None:
    """Prints the ratio of the steps per second of each pair, and their median."""
    from tests.benchmarks.compare import STEPS, median_rate, parse_count, summarize, trainer_loop

    parser = argparse.ArgumentParser()
    parser.add_argument('model', nargs='?', default='mlp', choices=list(MODELS))
    parser.add_argument('--pairs', type=parse_count, default=15)
    parser.add_argument('--steps', type=parse_count)
    args, args.options = parser.parse_known_args()
    steps = args.steps or STEPS[args.model]
    ratios = []
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        linen = trainer_loop(args, one)
        args.options = [*args.options, f'--config.model.target={MODELS[args.model]}']
        nnx = trainer_loop(args, other)
        for pair in range(-1, args.pairs):
            # Whichever comes first in a pair comes second in the next one.
            order = (linen, nnx) if pair % 2 else (nnx, linen)
            rates = {run: median_rate(run, steps) for run in order}
            if pair >= 0:  # The first one also compiles.
                ratios.append(rates[nnx] / rates[linen])
                both = f'Linen {rates[linen]:.4g} steps/s, NNX {rates[nnx]:.4g} steps/s'
                print(f'{args.model}: {both}, ratio {ratios[-1]:.2f}', flush=True)
    print(summarize(ratios))


if __name__ == '__main__':
    main()
