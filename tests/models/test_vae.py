# SPDX-License-Identifier: Apache-2.0
"""The variational autoencoder in Linen and in NNX is one model."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from trainer.models.vae import VAE
from trainer.models.vae_nnx import VAE as NNXVAE

X = np.random.default_rng(0).uniform(size=(3, 6, 5, 2)).astype(np.float32)
ARGUMENTS = dict(shape=(6, 5, 2), latents=4, hidden=8)


def test_the_number_of_parameters() -> None:
    shapes = jax.eval_shape(VAE().init, jax.random.key(0), np.zeros((1, 784)), jax.random.key(1))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 815_824


def test_both_compute_the_same() -> None:
    key = jax.random.key(2)
    linen = VAE(**ARGUMENTS)
    variables = linen.init(jax.random.key(0), X, key)
    model = NNXVAE(**ARGUMENTS, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, variables['params'])
    nnx.update(model, state)
    for a, b in zip(linen.apply(variables, X, key), model(X, key), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_outputs() -> None:
    """The codes have the mean and the variance that the model returns."""
    linen = VAE(**ARGUMENTS)
    variables = linen.init(jax.random.key(0), X, jax.random.key(0))
    logits, mean, log_variance = linen.apply(variables, X, jax.random.key(1))
    assert logits.shape == X.shape and mean.shape == log_variance.shape == (3, 4)
    noise = jax.random.normal(jax.random.key(1), (3, 4))
    z = mean + np.sqrt(np.exp(log_variance)) * noise
    decoded = linen.apply(variables, z, method='decode')
    np.testing.assert_allclose(decoded, logits, rtol=1e-5, atol=1e-6)
