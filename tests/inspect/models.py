# SPDX-License-Identifier: Apache-2.0
"""Models with a non-finite value in a known layer and step."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.command import ROOT
from trainer.experiment import Experiment, load_and_build

# In which step, counted from 1.
STEP = 13


def build(model: dict[str, Any], **overrides: Any) -> Experiment:
    """Returns an experiment of 40 steps on 960 images."""
    options: dict[str, Any] = {
        'train_for': '40 steps', 'log__every': '10 steps', 'evals': {}, 'model': model,
        'checkpoint__every': 'never', 'data__source__limit': 960,
    }  # fmt: skip
    return load_and_build(str(ROOT / 'configs' / 'mnist_mlp.py'), **{**options, **overrides})


def linen(**arguments: Any) -> dict[str, Any]:
    return {'target': f'{__name__}:Net', **arguments}


def nnx_model(**arguments: Any) -> dict[str, Any]:
    return {'target': f'{__name__}:NNXNet', **arguments}


class Layer(nn.Module):
    """A dense layer that returns NaN, or has a gradient of NaN, in one step of training."""

    bad: str = ''

    @nn.compact
    def __call__(self, x: Any) -> Any:
        seen = self.variable('count', 'steps', lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing() and self.is_mutable_collection('count'):
            seen.value += 1
        x = nn.relu(nn.Dense(16, name='dense')(x))
        return make_bad(x, self.bad, seen.value)


class Net(nn.Module):
    """Four layers, one of which may be bad; or a scanned stack."""

    bad: int | None = None
    how: str = 'output'
    scans: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(16, name='first')(x.reshape(len(x), -1))
        if self.scans:
            axes = {'params': 0, 'count': 0, 'intermediates': 0, 'perturbations': 0}
            scan = nn.scan(Scanned, variable_axes=axes, split_rngs={'params': True}, length=4)
            x, _ = scan(self.bad, name='layers')(x, jnp.arange(4))
        else:
            for k in range(4):
                bad = self.how if k == self.bad else ''
                x = Layer(bad, name=f'layer_{k}')(x)
        return nn.Dense(10, name='last')(x)


class Scanned(nn.Module):
    bad: int | None

    @nn.compact
    def __call__(self, x: Any, k: Any) -> Any:
        y = Layer(name='layer')(x)
        seen = self.variable('count', 'steps', lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing() and self.is_mutable_collection('count'):
            seen.value += 1
        spoil = (k == (-1 if self.bad is None else self.bad)) & (seen.value == STEP)
        return Mark(name='mark')(y, spoil), None


class Mark(nn.Module):
    """Returns NaN if it is told to."""

    @nn.compact
    def __call__(self, x: Any, spoil: Any) -> Any:
        return jnp.where(spoil, jnp.nan, x)


class Lifted(nn.Module):
    """Lifted modules of many kinds, a recurrent layer and a layer of NNX."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x.reshape(len(x), 28, 28)
        x = nn.RNN(nn.SimpleCell(8, name='cell'), name='rnn')(x)[:, -1]
        x = nn.jit(nn.remat(nn.Dense))(8, name='dense')(x)
        x = nnx.bridge.to_linen(nnx.Linear, 8, 8, name='of_nnx')(x)
        axes = {'params': 0, 'intermediates': 0, 'perturbations': 0}
        many = nn.vmap(
            nn.Dense, variable_axes=axes, split_rngs={'params': True}, in_axes=None, axis_size=2
        )
        return nn.Dense(10, name='last')(many(8, name='many')(x).sum(0))


class Bridged(nnx.Module):
    """A Linen module inside an NNX module."""

    def __init__(self, *, rngs: nnx.Rngs):
        inner = nn.Sequential([nn.Dense(8), nn.relu])
        self.of_linen = nnx.bridge.ToNNX(inner, rngs=rngs)
        self.last = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.of_linen(x.reshape(len(x), -1)))


class Count(nnx.Variable):
    """Number of training steps so far."""


class NNXLayer(nnx.Module):
    def __init__(self, bad: str, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(16, 16, rngs=rngs)
        self.count = Count(jnp.zeros((), jnp.int32))
        self.bad = bad

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count[...] += 1
        return make_bad(nnx.relu(self.dense(x)), self.bad, self.count[...])


class NNXNet(nnx.Module):
    def __init__(self, bad: int | None = None, how: str = 'output', *, rngs: nnx.Rngs):
        self.first = nnx.Linear(784, 16, rngs=rngs)
        self.layers = nnx.List(NNXLayer(how if k == bad else '', rngs=rngs) for k in range(4))
        self.last = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x.reshape(len(x), -1))
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


class Branching(nnx.Module):
    """Calls a layer in a branch, in a loop, or inside a plain JAX transformation."""

    registered: ClassVar[set[str]] = set()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert cls.__name__ not in cls.registered
        cls.registered.add(cls.__name__)

    def __init__(self, how: str, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(784, 10, rngs=rngs)
        self.one, self.two = (nnx.Linear(10, 10, rngs=rngs) for _ in range(2))
        self.how = how

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x.reshape(len(x), -1))
        if self.how == 'cond':
            branches = [lambda m, x: m.one(x), lambda m, x: m.two(x)]
            return nnx.cond(x.sum() > 0, *branches, self, x)
        if self.how == 'fori_loop':
            return nnx.fori_loop(0, 3, lambda _, c: (c[0], c[0].one(c[1])), (self, x))[1]
        if self.how == 'while_loop':
            step: Any = lambda c: (c[0], c[0].one(c[1]), c[2] + 1)  # noqa: E731
            return nnx.while_loop(lambda c: c[2] < 3, step, (self, x, 0))[1]
        return jax.checkpoint(lambda x: self.one(x))(x)


class BranchingBelow(Branching):
    """A subclass that its base class knows."""


def make_bad(x: Any, how: str, count: Any) -> Any:
    """Returns the array, non-finite in one step: its values, or only the gradient through it."""
    if how == 'output':
        return jnp.where(count == STEP, jnp.nan, x)
    if how == 'gradient':
        # The root of 0 is 0, and its slope is not finite.
        root = jnp.sqrt(0.0 * jnp.sum(x) + jnp.where(count == STEP, 0.0, 1.0))
        return x + root - jax.lax.stop_gradient(root)
    return x
