# SPDX-License-Identifier: Apache-2.0
"""A variational autoencoder of dense layers (Kingma & Welling, 2014).

B: batch, X: pixels of an image, in any number of dimensions, H: hidden units, Z: latent variables.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class VAE(nn.Module):
    """An encoder and a decoder with one hidden layer each, for images of black and white pixels.

    The latent variables are normal, and independent given the image. 815,824 parameters by default.

    Attributes:
        shape: height, width and channels of an image.
        latents: number of latent variables.
        hidden: units of each hidden layer.
        dtype: dtype of the computation; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    shape: tuple[int, ...] = (28, 28, 1)
    latents: int = 20
    hidden: int = 500
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers; the methods share them."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.encoder = nn.Dense(self.hidden, **dtypes)
        self.mean = nn.Dense(self.latents, **dtypes)
        self.log_variance = nn.Dense(self.latents, **dtypes)
        self.decoder = nn.Dense(self.hidden, **dtypes)
        self.logits = nn.Dense(math.prod(self.shape), **dtypes)

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
        h = nn.relu(self.encoder(x.reshape(x.shape[0], -1)))
        return self.mean(h), self.log_variance(h)

    def decode(self, z: jax.Array) -> jax.Array:
        """Returns logits (B, X) of the pixels, given latent codes (B, Z)."""
        h = nn.relu(self.decoder(z))
        return self.logits(h).reshape(z.shape[0], *self.shape)
