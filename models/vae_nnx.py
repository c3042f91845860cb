# SPDX-License-Identifier: Apache-2.0
"""A variational autoencoder of dense layers (Kingma & Welling, 2014), written with NNX.

B: batch, X: pixels of an image, in any number of dimensions, H: hidden units, Z: latent variables.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx


class VAE(nnx.Module):
    """An encoder and a decoder with one hidden layer each, as in `trainer.models.vae`."""

    def __init__(
        self,
        *,
        shape: tuple[int, ...] = (28, 28, 1),
        latents: int = 20,
        hidden: int = 500,
        rngs: nnx.Rngs,
    ):
        """Creates the parameters.

        Args:
            shape: height, width and channels of an image.
            latents: number of latent variables.
            hidden: units of each hidden layer.
            rngs: random keys of the initial parameters.
        """
        pixels = math.prod(shape)
        self.shape = shape
        self.encoder = nnx.Linear(pixels, hidden, rngs=rngs)
        self.mean = nnx.Linear(hidden, latents, rngs=rngs)
        self.log_variance = nnx.Linear(hidden, latents, rngs=rngs)
        self.decoder = nnx.Linear(latents, hidden, rngs=rngs)
        self.logits = nnx.Linear(hidden, pixels, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Encodes images, draws a latent code for each, and decodes it.

        Args:
            x: (B, X), pixels from 0 to 1.
            key: random key of the draws.

        Returns:
            Logits (B, X) of the pixels; means and log variances (B, Z) of the latent variables.
        """
        mean, log_variance = self.encode(x)
        # As a function of mean and variance, so that the draws have gradients with respect to both.
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        z = mean + jnp.exp(log_variance / 2) * noise
        return self.decode(z), mean, log_variance

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns means and log variances (B, Z) of the latent variables, given images (B, X)."""
        h = nnx.relu(self.encoder(x.reshape(x.shape[0], -1)))
        return self.mean(h), self.log_variance(h)

    def decode(self, z: jax.Array) -> jax.Array:
        """Returns logits (B, X) of the pixels, given latent codes (B, Z)."""
        h = nnx.relu(self.decoder(z))
        return self.logits(h).reshape(z.shape[0], *self.shape)
