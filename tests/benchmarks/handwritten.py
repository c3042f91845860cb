# SPDX-License-Identifier: Apache-2.0
"""The loop that a JAX user writes by hand: the other side of every speed comparison.

    python tests/benchmarks/handwritten.py {mlp,cnn} --steps=3000

Linen, optax, `flax.training.train_state`, one jitted and donated step, numpy batches handed
straight to it, the loss read every 100 steps. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pathlib
import resource
import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState

_DATA = pathlib.Path(__file__).resolve().parents[2] / 'data' / 'mnist'
_BATCH = 32
_LOG_EVERY = 100


class MLP(nn.Module):
    """784-64-10."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits."""
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


class CNN(nn.Module):
    """The network of the Flax quickstart."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits."""
        x = nn.avg_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(64, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(10)(nn.relu(nn.Dense(256)(x)))


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns float images (n, 28, 28, 1) and labels (n,)."""
    images = gzip.decompress((_DATA / f'{split}-images-idx3-ubyte.gz').read_bytes())
    labels = gzip.decompress((_DATA / f'{split}-labels-idx1-ubyte.gz').read_bytes())
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1).astype(np.float32) / 255
    return x, np.frombuffer(labels, np.uint8, offset=8).astype(np.int32)


def train_step(state: TrainState, images: Any, labels: Any) -> tuple[TrainState, Any, Any]:
    """Returns the new state, the loss and the accuracy."""

    def loss_fn(params: Any) -> Any:
        logits = state.apply_fn({'params': params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), logits

    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), loss, (logits.argmax(-1) == labels).mean()


def main() -> None:
    """Trains and prints the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument('model', choices=['mlp', 'cnn'])
    parser.add_argument('--steps', type=int, default=3000)
    parser.add_argument('--cache', default=None)
    args = parser.parse_args()
    if args.cache:
        jax.config.update('jax_compilation_cache_dir', args.cache)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    images, labels = load('train')
    model = {'mlp': MLP, 'cnn': CNN}[args.model]()
    params = model.init(jax.random.key(0), images[:1])['params']
    tx = optax.sgd(0.01, momentum=0.9)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    step_fn = jax.jit(train_step, donate_argnums=0)
    rng, order, position = np.random.default_rng(0), np.zeros(0, np.int64), 0
    rates, began, first = [], 0.0, 0.0
    for step in range(1, args.steps + 1):
        if position + _BATCH > len(order):
            order, position = rng.permutation(len(images)), 0
        rows = order[position : position + _BATCH]
        position += _BATCH
        state, loss, _ = step_fn(state, images[rows], labels[rows])
        if step == 1:
            jax.block_until_ready(loss)
            first = time.time() - float(os.environ.get('BENCHMARK_BEGAN', 'nan'))
        if step % _LOG_EVERY == 0:
            float(loss)
            now = time.perf_counter()
            if began:
                rates.append(_LOG_EVERY / (now - began))
            began = now
    figures = {
        'steps_per_sec': statistics.median(rates) if rates else None,
        'first_step_secs': first,
        'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(figures))


if __name__ == '__main__':
    main()
