# SPDX-License-Identifier: Apache-2.0
"""The loop that a JAX user writes by hand: the other side of every speed comparison.

    python tests/benchmarks/handwritten.py {mlp,cnn,lm} --steps=3000

Linen, optax, `flax.training.train_state`, one jitted and donated step, numpy batches handed
straight to it, the loss read every 100 steps (50 for `lm`). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pathlib
import resource
import statistics
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.core import meta
from flax.training.train_state import TrainState

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DATA = _ROOT / 'data' / 'mnist'
_BATCH = {'mlp': 32, 'cnn': 32, 'lm': 8}
_LOG_EVERY = {'mlp': 100, 'cnn': 100, 'lm': 50}


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


def transformer() -> nn.Module:
    """Returns the model of `configs/lm.py:bytes`: the loops are compared, and not two models."""
    sys.path.insert(0, str(_ROOT))
    from trainer.models.transformer import Transformer

    return Transformer(layers=4, width=256, heads=4, max_length=128)


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens (n, 128) and the tokens after them."""
    sys.path.insert(0, str(_ROOT))
    from trainer.data.text import python_source

    arrays = python_source(128).gather(np.arange(20_000))
    return arrays['inputs'], arrays['targets']


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns float images (n, 28, 28, 1) and labels (n,)."""
    images = gzip.decompress((_DATA / f'{split}-images-idx3-ubyte.gz').read_bytes())
    labels = gzip.decompress((_DATA / f'{split}-labels-idx1-ubyte.gz').read_bytes())
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1).astype(np.float32) / 255
    return x, np.frombuffer(labels, np.uint8, offset=8).astype(np.int32)


def optimizer() -> optax.GradientTransformation:
    """Returns what trains the transformer."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 2000)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))


def train_step(state: TrainState, images: Any, labels: Any) -> tuple[TrainState, Any, Any]:
    """Returns the new state, the loss and the accuracy."""

    def loss_fn(params: Any) -> Any:
        logits = state.apply_fn({'params': params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), logits

    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), loss, (logits.argmax(-1) == labels).mean()


class Loop:
    """The loop, which may be run in parts.

    Attributes:
        first_step_secs: time from BENCHMARK_BEGAN (of the environment) to the first finished step.
    """

    def __init__(self, model: str):
        """Loads the data and makes the state.

        Args:
            model: 'mlp', 'cnn' or 'lm'.
        """
        self._images, self._labels = load_text() if model == 'lm' else load('train')
        module = transformer() if model == 'lm' else {'mlp': MLP, 'cnn': CNN}[model]()
        self._batch, self._log_every = _BATCH[model], _LOG_EVERY[model]
        params = meta.unbox(module.init(jax.random.key(0), self._images[:1])['params'])
        tx = optimizer() if model == 'lm' else optax.sgd(0.01, momentum=0.9)
        self._state = TrainState.create(apply_fn=module.apply, params=params, tx=tx)
        self._step = jax.jit(train_step, donate_argnums=0)
        self._rng, self._order, self._position = np.random.default_rng(0), np.zeros(0, np.int64), 0
        self.first_step_secs: float | None = None

    def run(self, steps: int) -> list[float]:
        """Trains for some steps; returns steps per second between each two log lines."""
        state, order, position = self._state, self._order, self._position
        batch, log_every, step_fn = self._batch, self._log_every, self._step
        images, labels = self._images, self._labels
        rates, began = [], 0.0
        for step in range(1, steps + 1):
            if position + batch > len(order):
                order, position = self._rng.permutation(len(images)), 0
            rows = order[position : position + batch]
            position += batch
            state, loss, _ = step_fn(state, images[rows], labels[rows])
            if self.first_step_secs is None:
                jax.block_until_ready(loss)
                self.first_step_secs = time.time() - float(os.environ.get('BENCHMARK_BEGAN', 'nan'))
            if step % log_every == 0:
                float(loss)
                now = time.perf_counter()
                if began:
                    rates.append(log_every / (now - began))
                began = now
        self._state, self._order, self._position = state, order, position
        return rates


def main() -> None:
    """Trains and prints the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument('model', choices=list(_BATCH))
    parser.add_argument('--steps', type=int, default=3000)
    parser.add_argument('--cache', default=None)
    args = parser.parse_args()
    if args.cache:
        jax.config.update('jax_compilation_cache_dir', args.cache)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    loop = Loop(args.model)
    rates = loop.run(args.steps)
    figures = {
        'steps_per_sec': statistics.median(rates) if rates else None,
        'first_step_secs': loop.first_step_secs,
        'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(figures))


if __name__ == '__main__':
    main()
