# SPDX-License-Identifier: Apache-2.0
"""A GAN of points in the plane, small enough to write its step by hand."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from trainer.data.sources import ArraySource
from trainer.tasks import TaskOutput

CENTRE = np.array([2.0, -1.0], np.float32)
LATENT = 4


class Net(nn.Module):
    """A net of one hidden layer."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.leaky_relu(nn.Dense(16)(x))
        return nn.Dense(self.features)(x)


class GAN(nn.Module):
    """A generator of points and a discriminator."""

    def setup(self) -> None:
        self.generator = Net(2)
        self.discriminator = Net(1)


class Points(ArraySource):
    """Points around `CENTRE`."""

    def __init__(self, n: int):
        noise = np.random.default_rng(0).normal(size=(n, 2))
        super().__init__({'x': (CENTRE + 0.3 * noise).astype(np.float32)})


def losses(real: jax.Array, fake: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the generator's and the discriminator's loss of each pair of logits, (batch,)."""
    gen = optax.sigmoid_binary_cross_entropy(fake, jnp.ones_like(fake))
    disc = optax.sigmoid_binary_cross_entropy(real, jnp.ones_like(real))
    return gen, disc + optax.sigmoid_binary_cross_entropy(fake, jnp.zeros_like(fake))


def task(model: Any, batch: Any) -> TaskOutput:
    """Both games from one forward pass."""
    fake = model.generator(jax.random.normal(model.rng('latent'), (len(batch['x']), LATENT)))
    real_logits = model.discriminator(batch['x'])[:, 0]
    gen, disc = losses(real_logits, model.discriminator(fake)[:, 0])
    distance = jnp.linalg.norm(fake - CENTRE, axis=-1)
    return TaskOutput(loss={'gen': gen, 'disc': disc}, metrics={'distance': distance})


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    c = ml_collections.ConfigDict()
    c.train_for = '60 steps'
    c.model = dict(target='tests.step.gan:GAN')
    c.task = dict(ref='tests.step.gan:task')
    c.data = dict(source=dict(target='tests.step.gan:Points', n=200), batch_size=16)
    split = dict(source=dict(target='tests.step.gan:Points', n=50), batch_size=16)
    c.evals = dict(test=dict(every='never', data=split))
    groups = dict(
        gen=dict(
            target='optax:adam',
            b1=0.5,
            learning_rate=dict(
                target='optax:linear_schedule',
                init_value=0.01,
                end_value=0.0,
                transition_steps='100%',
            ),
            params='generator/.*',
            loss='gen',
        ),
        disc=dict(target='optax:sgd', learning_rate=0.1, params='discriminator/.*', loss='disc'),
    )
    c.optimizer = dict(groups=groups)
    c.checkpoint = dict(every='20 steps')
    c.log = dict(every='10 steps')
    return c
