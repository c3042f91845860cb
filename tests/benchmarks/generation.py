# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of greedy generation, with and without a cache, and of a beam search.

    python tests/benchmarks/generation.py [--batch=8] [--prompt=32] [--count=96]

The best of three, for a transformer of 4 layers and width 256.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from trainer.models.beam_search import beam_search
from trainer.models.decoding import with_cache, without_cache
from trainer.models.generation import generate
from trainer.models.transformer import Transformer


def measure_secs(function: Callable[..., Any], *args: Any) -> float:
    """Returns the least time of three calls, after one that compiles."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--prompt', type=int, default=32, help='tokens of a prompt')
    parser.add_argument('--count', type=int, default=96, help='tokens to generate')
    options = parser.parse_args()
    length = options.prompt + options.count
    prompt = jnp.ones((options.batch, options.prompt), jnp.int32)
    model = Transformer(width=256, max_length=length, positions='rotary', tied=True)
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), prompt))
    cached = with_cache(model.clone(decode=True), variables, options.batch, length)
    full = without_cache(lambda x: model.apply(variables, x), options.batch, length)
    ways: dict[str, Callable[[jax.Array], Any]] = {
        'with the cache': lambda x: generate(*cached, x, count=options.count),
        'without a cache': jax.jit(lambda x: generate(*full, x, count=options.count)),
        '4 beams, with the cache': lambda x: beam_search(*cached, x, count=options.count),
    }
    for name, way in ways.items():
        tokens = options.batch * options.count / measure_secs(way, prompt)
        print(f'{name}: {tokens:.0f} tokens/s')


if __name__ == '__main__':
    main()
