# SPDX-License-Identifier: Apache-2.0
"""The examples of NNX's first README, with the current library."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.command import ROOT
from trainer.experiment import Experiment, load_and_build
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys
from trainer.tasks import TaskOutput
from trainer.trainer import Trainer

X = jnp.linspace(-1.0, 1.0, 64)[:, None]
Y = 0.8 * X**2 + 0.1


class Count(nnx.Variable):
    """The number of calls so far."""


class MLP(nnx.Module):
    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        self.count = Count(jnp.zeros((), jnp.int32))
        self.one = nnx.Linear(1, hidden, rngs=rngs)
        self.two = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count[...] += 1
        return self.two(nnx.relu(self.one(x)))


def test_01_functional_api() -> None:
    """Split into parameters and the rest, run a pure step, merge."""
    graph, params, counts = nnx.split(MLP(16, rngs=nnx.Rngs(0)), nnx.Param, Count)
    with pytest.raises(ValueError, match='Non-exhaustive'):
        nnx.split(MLP(16, rngs=nnx.Rngs(0)), nnx.Param)

    @jax.jit
    def step(params: Any, counts: Any) -> Any:
        def loss(params: Any) -> Any:
            model = nnx.merge(graph, params, counts, copy=True)
            error = jnp.mean((model(X) - Y) ** 2)
            return error, nnx.state(model, Count)

        (error, counts), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), counts, error

    errors = []
    for _ in range(50):
        params, counts, error = step(params, counts)
        errors.append(float(error))
    assert errors[-1] < errors[0] / 2
    assert nnx.merge(graph, params, counts).count[...] == 50


def test_02_lifted_transforms() -> None:
    """The module goes through the transforms, and nothing is returned."""
    model = MLP(16, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model: MLP) -> jax.Array:
        def loss(model: MLP) -> jax.Array:
            return jnp.mean((model(X) - Y) ** 2)

        error, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.Param))(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return error

    errors = [float(step(model)) for _ in range(50)]
    assert errors[-1] < errors[0] / 2
    assert model.count[...] == 50


def test_03_train_state() -> None:
    """`nnx.Optimizer` replaces the README's TrainState."""
    model = MLP(16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: MLP, optimizer: nnx.Optimizer) -> jax.Array:
        error, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return error

    errors = [float(step(model, optimizer)) for _ in range(50)]
    assert errors[-1] < errors[0] / 2
    assert optimizer.step[...] == 50


def test_04_pure_modules() -> None:
    """A module as a graph and a state, here called a functional model."""
    make = as_functional(lambda rngs: MLP(16, rngs=rngs))
    variables = make.init(lambda *_: None, {}, Keys(seed=0, mode='init'))
    model = make.bind(variables, Keys(seed=0, mode='train'))
    output = model(X)
    graph, state = nnx.split(MLP(16, rngs=nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, {**dict(variables['params']), **dict(variables['count'])})
    other, (_, counted) = nnx.call((graph, state))(X)
    np.testing.assert_allclose(output, other, rtol=1e-6)
    assert model.collections['count']['count'] == counted['count'][...] == 1


class VAE(nnx.Module):
    """A variational autoencoder of binary images, with its KL loss in an Intermediate."""

    def __init__(self, latent: int = 8, *, rngs: nnx.Rngs):
        self.encode = nnx.Linear(784, 64, rngs=rngs)
        self.mean = nnx.Linear(64, latent, rngs=rngs)
        self.log_std = nnx.Linear(64, latent, rngs=rngs)
        self.decode = nnx.Sequential(
            nnx.Linear(latent, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 784, rngs=rngs)
        )
        self.rngs = rngs.fork()

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nnx.relu(self.encode(x.reshape(len(x), -1)))
        mean, log_std = self.mean(hidden), self.log_std(hidden)
        kl = 0.5 * (mean**2 + jnp.exp(2 * log_std) - 2 * log_std - 1).sum(-1)
        self.kl_loss = nnx.Intermediate(kl)
        noise = jax.random.normal(self.rngs.noise(), mean.shape)
        return self.decode(mean + jnp.exp(log_std) * noise)


def reconstruction(model: Any, batch: Any) -> TaskOutput:
    pixels = (batch['image'] > 0.5).astype(jnp.float32).reshape(len(batch['image']), -1)
    logits = model(batch['image'])
    loss = optax.sigmoid_binary_cross_entropy(logits, pixels).sum(-1)
    kl = model.intermediates['kl_loss']
    return TaskOutput(loss=loss + 0.1 * kl, metrics={'kl': kl, 'reconstruction': loss})


def experiment(model: str, task: Any, **options: Any) -> Experiment:
    common = {
        'train_for': '60 steps', 'log__every': '20 steps', 'evals': {},
        'checkpoint__every': 'never', 'data__source__limit': 960, 'task': task,
        'model': {'target': f'{__name__}:{model}'},
        'optimizer': {'target': 'optax:adam', 'learning_rate': 3e-3},
    }  # fmt: skip
    return load_and_build(str(ROOT / 'configs' / 'mnist_mlp.py'), **{**common, **options})


def plain(fn: Any) -> dict[str, str]:
    return {'ref': f'{__name__}:{fn.__name__}'}


def losses(made: Experiment, tmp_path: pathlib.Path) -> list[float]:
    Trainer(made, str(tmp_path)).fit()
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    return [row['train/loss'] for row in rows if 'train/loss' in row]


@pytest.mark.slow
def test_05_a_vae(tmp_path: pathlib.Path) -> None:
    """The task reads the KL loss as an intermediate; the noise depends on the run's seed."""
    made = experiment('VAE', plain(reconstruction))
    found = losses(made, tmp_path)
    assert found[-1] < 0.6 * found[0]
    row = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
    assert row['train/kl'] > 0
    assert row['train/loss'] == pytest.approx(
        row['train/reconstruction'] + 0.1 * row['train/kl'], rel=1e-4
    )


class Layer(nnx.Module):
    def __init__(self, width: int, norm: nnx.BatchNorm, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)


class ScanMLP(nnx.Module):
    """Scanned layers with separate parameters and dropout, and a shared BatchNorm."""

    def __init__(self, width: int = 32, layers: int = 4, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> Layer:
            return Layer(width, None, rngs=rngs)

        self.first = nnx.Linear(784, width, rngs=rngs)
        self.layers = make(rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.last = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        # The shared module is carried from layer to layer.
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(carry: Any, layer: Layer) -> Any:
            x, norm = carry
            return x + layer.drop(nnx.gelu(norm(layer.linear(x)))), norm

        x, self.norm = run((self.first(x.reshape(len(x), -1)), self.norm), self.layers)
        return self.last(x)


@pytest.mark.slow
def test_06_scan_over_layers(tmp_path: pathlib.Path) -> None:
    made = experiment('ScanMLP', {'target': 'trainer.tasks:Classification'})
    assert losses(made, tmp_path)[-1] < 1.5
    state = Trainer(made).init_state()
    assert state.params['layers']['linear']['kernel'].shape == (4, 32, 32)
    assert state.collections['batch_stats']['norm']['mean'].shape == (32,)


class Block(nnx.Module):
    def __init__(self, width: int, decode: bool, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=width, decode=decode, rngs=rngs
        )
        self.mlp = nnx.Sequential(
            nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, 4 * width, rngs=rngs), nnx.gelu,
            nnx.Linear(4 * width, width, rngs=rngs),
        )  # fmt: skip

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.mlp(x)


class Decoder(nnx.Module):
    """An autoregressive transformer with scanned layers and a cache for generation."""

    def __init__(
        self, vocab: int = 256, width: int = 32, layers: int = 2, decode: bool = False,
        *, rngs: nnx.Rngs,
    ):  # fmt: skip
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> Block:
            return Block(width, decode, rngs=rngs)

        self.decode = decode
        self.tokens = nnx.Embed(vocab, width, rngs=rngs)
        self.positions = nnx.Embed(64, width, rngs=rngs)
        self.blocks = make(rngs)
        self.last = nnx.Linear(width, vocab, rngs=rngs)

    def __call__(self, tokens: jax.Array, first: int | jax.Array = 0) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: jax.Array, block: Block) -> jax.Array:
            return block(x, mask)

        mask = None if self.decode else nnx.make_causal_mask(tokens)
        x = self.tokens(tokens) + self.positions(first + jnp.arange(tokens.shape[1]))
        return self.last(run(x, self.blocks))


@pytest.mark.slow
def test_07_a_transformer(tmp_path: pathlib.Path) -> None:
    """Trains on text; cached generation equals full passes."""
    source = {'target': 'trainer.data.text:python_source', 'seq_len': 32, 'limit': 960}
    task = {'target': 'trainer.tasks:NextToken', 'tokens': 'inputs'}
    options = {'data__source': source, 'data__device_transforms': ()}
    made = experiment('Decoder', task, **options)
    found = losses(made, tmp_path)
    assert found[-1] < 0.8 * found[0]

    params = Trainer(made).init_state().params
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8)))
    keys = Keys(seed=0, mode='eval')
    model = as_functional(lambda rngs: Decoder(rngs=rngs)).bind({'params': params}, keys)
    whole = model(tokens)

    step = Decoder(decode=True, rngs=nnx.Rngs(0))
    state = nnx.state(step, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(step, state)

    @nnx.vmap(in_axes=(0,))
    def reset(block: Block) -> None:
        block.attention.init_cache((2, 8, 32))

    reset(step.blocks)
    said = [step(tokens[:, i : i + 1], i) for i in range(8)]
    np.testing.assert_allclose(jnp.concatenate(said, axis=1), whole, rtol=2e-4, atol=2e-5)
