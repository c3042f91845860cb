# SPDX-License-Identifier: Apache-2.0
"""Processor time of depthwise convolutions as `nn.Conv`, divided by that as a sum of images.

    python tests/benchmarks/depthwise.py [--batch=8] [--size=128]

For each shape of these layers in EfficientNet-Lite0: that of one gradient with respect to images
and kernel, the least of five.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from trainer.models.efficientnet import LITE0, DepthwiseSum


def measure_secs(layer: nn.Module, x: jax.Array) -> float:
    """Returns the processor time of a gradient, in seconds."""
    variables: Any = jax.jit(layer.init)(jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda v, x: jnp.square(layer.apply(v, x)).sum(), argnums=(0, 1)))
    jax.block_until_ready(gradient(variables, x))
    times = []
    for _ in range(5):
        start = time.process_time()
        jax.block_until_ready(gradient(variables, x))
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', type=int, default=128, help='height and width of the images')
    options = parser.parse_args()
    channels, size = 32, -(-options.size // 2)
    for blocks, kernel, strides, expansion, features in LITE0:
        for stride in (strides, 1)[:blocks]:
            width = channels * expansion
            x = jax.random.normal(jax.random.key(1), (options.batch, size, size, width))
            conv = nn.Conv(
                width, (kernel, kernel), stride, feature_group_count=width, use_bias=False
            )
            ratio = measure_secs(conv, x) / measure_secs(DepthwiseSum(kernel, stride), x)
            shape = f'{size:3} pixels  {width:4} channels  kernel {kernel}  stride {stride}'
            print(f'{shape}  {ratio:.1f}')
            channels, size = features, -(-size // stride)


if __name__ == '__main__':
    main()
