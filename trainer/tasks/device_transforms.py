# SPDX-License-Identifier: Apache-2.0
"""Transforms that run within the compiled step, on batches of JAX arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.errors import UserError
from trainer.tasks.batch import Batch, with_field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixup:
    """Replaces each training example by a mixture of two (Zhang et al., 2017).

    Inputs and labels are mixed with the same weights, drawn for each example; its own is never less
    than that of the other. Labels become probabilities, float32 (batch, num_classes), which
    `trainer.tasks:Classification` takes; its accuracy is that for the label with the larger weight.
    In evaluation nothing changes.

    Examples are mixed within a batch, and with `accumulate` within a micro-batch. With
    `data.remainder='pad'`, one example of the last batch of an epoch is mixed with padding.

    Attributes:
        alpha: both parameters of the beta distribution of the weights: near 0 examples are hardly
            mixed, with 1 the weights are uniform.
        num_classes: number of classes.
        inputs: field of floating-point inputs, (batch, ...).
        label: field of integer labels (batch,). One out of range becomes -1 for all classes, which
            the task reports as an error.
    """

    alpha: float = 0.2
    num_classes: int
    inputs: str = 'image'
    label: str = 'label'

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f'alpha: {self.alpha}; expected a positive number')

    def __call__(self, batch: Batch, key: jax.Array, training: bool) -> dict[str, Any]:
        """Returns the batch with inputs and labels mixed.

        Args:
            batch: arrays (batch, ...) by field name.
            key: random key of the step.
            training: whether this is a training step.

        Raises:
            UserError: if the inputs are integers, or the labels are not.
        """
        if not training:
            return dict(batch)
        x, label = batch[self.inputs], batch[self.label]
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(
                f'Mixup: {self.inputs!r} is {x.dtype}; put Mixup after ToFloat or Normalize'
            )
        if label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.integer):
            raise UserError(
                f'Mixup: {self.label!r} is {label.dtype}{list(label.shape)}; expected integers '
                f'[{len(x)}], one class for each example'
            )
        own = jax.random.beta(key, self.alpha, self.alpha, (len(x),))
        own = jnp.maximum(own, 1 - own)
        in_range = (label >= 0) & (label < self.num_classes)
        target = jax.nn.one_hot(label, self.num_classes)
        target = jnp.where(in_range[:, None], target, -1.0)
        mixed = with_field(batch, self.inputs, _mix(x, own))
        return with_field(mixed, self.label, _mix(target, own))


def _mix(x: jax.Array, own: jax.Array) -> jax.Array:
    """Returns `own` of each row and the rest of the row before it."""
    weight = own.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return weight * x + (1 - weight) * jnp.roll(x, 1, axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resize:
    """Resizes images (batch, height, width, channels), in training and in evaluation.

    Attributes:
        size: the new height and width.
        method: method of `jax.image.resize`; images that get smaller are smoothed first.
        inputs: field of floating-point images.
    """

    size: tuple[int, int]
    method: str = 'bilinear'
    inputs: str = 'image'

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Returns the batch with the images resized.

        Raises:
            UserError: if the field is not an array of floating-point images.
        """
        images = batch[self.inputs]
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f'Resize: {self.inputs!r} is {images.dtype}{list(images.shape)}; expected '
                'floating-point images [batch, height, width, channels]: put Resize after ToFloat'
            )
        shape = (images.shape[0], *self.size, images.shape[3])
        return with_field(batch, self.inputs, jax.image.resize(images, shape, self.method))
