# SPDX-License-Identifier: Apache-2.0
"""The evidence lower bound of a variational autoencoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.config.errors import UserError
from trainer.modules.seen import describe
from trainer.observe.summaries import Images
from trainer.tasks.checks import Check
from trainer.tasks.task import Batch, TaskOutput

_WHY = (
    'Pixels are black (0) or white (1), or probabilities between them: add '
    'trainer.data.transforms:Binarize to the transforms of this data'
)
_EXPECTED = (
    'expected the logits of the pixels {shape}, and means and log variances [batch, latents] of '
    'the latent variables, in this order'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELBO:
    """The negative evidence lower bound in nats per image, for black and white images.

    It is the cross-entropy of the pixels given one latent code, drawn from the distribution that
    the encoder returns, plus the divergence of that distribution from the standard normal prior.

    The model is called as `model(images, key)`, where `key` is that of the RNG stream 'latent'. It
    returns logits (batch, height, width, channels), and means and log variances (batch, latents).
    It also has the methods `encode(images)`, which returns the latter two, and `decode(codes)`,
    which returns logits.

    Each evaluation shows `reconstructions`, pairs of an image and what the model makes of it; and
    `samples`, decoded from codes of the prior. These codes are the same in all evaluations, so that
    their images show the progress. Of both there are at most as many as the first batch has
    examples. Not supported for ensembles, because codes of different members have no mean.

    Attributes:
        inputs: batch key of the images, (batch, height, width, channels), from 0 to 1.
        pairs: number of reconstructions to show; 0 for none.
        samples: number of samples to show; 0 for none.
    """

    inputs: str = 'image'
    pairs: int = 32
    samples: int = 64

    def __call__(self, model: Any, batch: Batch) -> TaskOutput:
        """Returns losses (batch,), and their two parts as metrics.

        Raises:
            UserError: if the model returns something else, naming what it returns.
        """
        images = batch[self.inputs].astype(jnp.float32)
        output = model(images, model.rng('latent'))
        _check_output(output, images)
        # In half precision, the sum over the pixels would lose digits.
        logits, mean, log_variance = (x.astype(jnp.float32) for x in output)
        loss = optax.sigmoid_binary_cross_entropy(logits, images)
        reconstruction = loss.reshape(len(images), -1).sum(-1)
        divergence = jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance
        kl = divergence.sum(-1) / 2
        # Not in training, where decoding samples would update batch statistics.
        shown = {} if model.training else self._summaries(model, images, logits, mean)
        return TaskOutput(
            loss=reconstruction + kl,
            metrics={'reconstruction': reconstruction, 'kl': kl},
            checks={self.inputs: Check(images, 0, 1, why=_WHY)},
            summaries=shown,
        )

    def _summaries(
        self, model: Any, images: jax.Array, logits: jax.Array, mean: jax.Array
    ) -> dict[str, Any]:
        summaries: dict[str, Any] = {}
        if self.pairs:
            both = [images[: self.pairs], jax.nn.sigmoid(logits[: self.pairs])]
            summaries['reconstructions'] = Images(jnp.concatenate(both, axis=2), columns=4)
        if self.samples:
            # A fixed key: sample i of each evaluation has the same code.
            shape = (min(self.samples, len(images)), mean.shape[-1])
            decoded = model.decode(jax.random.normal(jax.random.key(0), shape))
            summaries['samples'] = Images(jax.nn.sigmoid(decoded))
        return summaries

    def combine(self, outputs: Any) -> Any:
        """Raises a UserError, because an ensemble of autoencoders has no common codes."""
        raise UserError(
            'config.ensemble: the members of an ensemble encode an image differently, and the mean '
            'of their codes has no meaning. Train one model, or set config.evals = {}'
        )

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns the mean code of each image (batch, latents), and what it is decoded to."""
        mean, _ = model.encode(batch[self.inputs].astype(jnp.float32))
        return {'code': mean, 'reconstruction': jax.nn.sigmoid(model.decode(mean))}


def _check_output(output: Any, images: jax.Array) -> None:
    """Checks, while the step is traced, what the model returns."""
    shapes = [jnp.shape(x) for x in output] if isinstance(output, tuple) else []
    is_valid = len(shapes) == 3 and shapes[0] == images.shape and shapes[1] == shapes[2]
    if not is_valid or len(shapes[1]) != 2 or shapes[1][0] != len(images):
        expected = _EXPECTED.format(shape=list(images.shape))
        raise UserError(f'config.task: the model returned {describe(output)}; {expected}')
