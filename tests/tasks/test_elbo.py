# SPDX-License-Identifier: Apache-2.0
"""The evidence lower bound: its two parts, what is shown, and models that do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.tasks import ELBO

IMAGES = np.random.default_rng(0).integers(0, 2, (5, 4, 4, 1)).astype(np.uint8)
LOGITS = np.random.default_rng(1).normal(size=(5, 4, 4, 1)).astype(np.float32)
MEAN = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
LOG_VARIANCE = np.random.default_rng(3).normal(size=(5, 3)).astype(np.float32)


@dataclasses.dataclass
class Fixed:
    """A model whose outputs are given; a code is decoded to its first element, in all pixels."""

    output: Any = (LOGITS, MEAN, LOG_VARIANCE)
    training: bool = False
    decoded: list[Any] = dataclasses.field(default_factory=list)

    def rng(self, name: str) -> jax.Array:
        assert name == 'latent'
        return jax.random.key(7)

    def __call__(self, x: jax.Array, key: jax.Array) -> Any:
        assert x.dtype == jnp.float32 and key == jax.random.key(7)
        return jax.tree.map(jnp.asarray, self.output)

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(MEAN), jnp.asarray(LOG_VARIANCE)

    def decode(self, z: jax.Array) -> jax.Array:
        self.decoded.append(z)
        return jnp.broadcast_to(z[:, :1, None, None], (len(z), 4, 4, 1))


def batch() -> Any:
    return {'image': jnp.asarray(IMAGES)}


def test_the_loss_is_cross_entropy_and_divergence() -> None:
    """The divergence of two normal distributions, by its integral."""
    output = ELBO()(Fixed(training=True), batch())
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    entropy = -(IMAGES * np.log(p) + (1 - IMAGES) * np.log(1 - p)).sum((1, 2, 3))
    z = np.linspace(-30, 30, 60_001)[:, None, None]
    variance = np.exp(LOG_VARIANCE.astype(np.float64))
    log_q = -((z - MEAN) ** 2) / (2 * variance) - np.log(2 * np.pi * variance) / 2
    log_prior = -(z**2) / 2 - np.log(2 * np.pi) / 2
    kl = (np.exp(log_q) * (log_q - log_prior)).sum(0).sum(-1) * 0.001
    np.testing.assert_allclose(output.metrics['reconstruction'], entropy, rtol=1e-5)
    np.testing.assert_allclose(output.metrics['kl'], kl, rtol=1e-4)
    np.testing.assert_allclose(output.loss, entropy + kl, rtol=1e-4)


def test_evaluations_show_the_same_codes() -> None:
    models = Fixed(), Fixed()
    for model in models:
        assert set(ELBO(samples=3)(model, batch()).summaries) == {'reconstructions', 'samples'}
    first, second = (model.decoded[0] for model in models)
    assert first.shape == (3, 3)
    np.testing.assert_array_equal(first, second)


def test_training_decodes_no_samples() -> None:
    """They would update batch statistics."""
    model = Fixed(training=True)
    assert ELBO()(model, batch()).summaries == {}
    assert model.decoded == []


def test_no_images_for_data_that_are_none() -> None:
    model = Fixed()
    assert ELBO(pairs=0, samples=0)(model, batch()).summaries == {}


def test_predictions_have_no_noise() -> None:
    predicted = ELBO().predict(Fixed(), batch())
    np.testing.assert_array_equal(predicted['code'], MEAN)
    expected = 1 / (1 + np.exp(-MEAN[:, 0]))
    np.testing.assert_allclose(predicted['reconstruction'][:, 0, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ('output', 'message'),
    [
        (LOGITS, r'the model returned float32\[5, 4, 4, 1\]; expected the logits'),
        ((LOGITS, MEAN), r'returned \(float32\[5, 4, 4, 1\], float32\[5, 3\]\)'),
        ((LOGITS, MEAN, MEAN[:, :2]), r'expected .* means and log variances \[batch, latents\]'),
        ((LOGITS[:, 0], MEAN, LOG_VARIANCE), r'expected the logits of the pixels \[5, 4, 4, 1\]'),
        ((LOGITS, MEAN[:4], LOG_VARIANCE[:4]), r'means and log variances'),
    ],
)
def test_models_that_do_not_fit(output: Any, message: str) -> None:
    with pytest.raises(UserError, match=f'config.task: .*{message}'):
        ELBO()(Fixed(output), batch())


def test_ensembles_are_refused() -> None:
    with pytest.raises(UserError, match='the mean of their codes has no meaning'):
        ELBO().combine((LOGITS, MEAN, LOG_VARIANCE))
