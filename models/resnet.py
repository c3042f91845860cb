# SPDX-License-Identifier: Apache-2.0
"""Residual networks for images of any size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax

from .norm import GroupedBatchNorm

# Makes a layer: arguments that are not bound yet are given where it is used.
Layer = Callable[..., Any]

# `config.init_from.rename` for the weights of torchvision's ResNets.
TORCHVISION = (
    (r'^conv1/', 'conv_init/'),
    (r'^bn1/', 'bn_init/'),
    (r'^layer(\d)/(\d+)/', r'stage\1_block\2/'),
    ('/downsample/0/', '/conv_proj/'),
    ('/downsample/1/', '/bn_proj/'),
    ('^fc/', 'head/'),
)

# Of a block's last normalisation: it begins as what came in.
_NOTHING = nn.initializers.zeros_init()


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3, and what came in.

    Attributes:
        features: output channels.
        strides: of the first convolution, in height and width.
        conv: makes a convolution.
        norm: makes a normalisation.
        activation: after each of them.
    """

    features: int
    strides: int
    conv: Layer
    norm: Layer
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (batch, height / strides, width / strides, features)."""
        y = self.conv(self.features, (3, 3), self.strides, padding=1, name='conv1')(x)
        y = self.activation(self.norm(name='bn1')(y))
        y = self.conv(self.features, (3, 3), padding=1, name='conv2')(y)
        y = self.norm(scale_init=_NOTHING, name='bn2')(y)
        return self.activation(_shortcut(self, x, y) + y)


class BottleneckBlock(nn.Module):
    """A convolution of 3 x 3 between two of 1 x 1, and what came in.

    Attributes:
        features: channels of the first two convolutions; the last one has four times as many.
        strides: of the middle convolution, in height and width.
        conv: makes a convolution.
        norm: makes a normalisation.
        activation: after each of them.
    """

    features: int
    strides: int
    conv: Layer
    norm: Layer
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (batch, height / strides, width / strides, 4 x features)."""
        y = self.conv(self.features, (1, 1), name='conv1')(x)
        y = self.activation(self.norm(name='bn1')(y))
        y = self.conv(self.features, (3, 3), self.strides, padding=1, name='conv2')(y)
        y = self.activation(self.norm(name='bn2')(y))
        y = self.conv(4 * self.features, (1, 1), name='conv3')(y)
        y = self.norm(scale_init=_NOTHING, name='bn3')(y)
        return self.activation(_shortcut(self, x, y) + y)


def _shortcut(block: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns what came in, in the shape of what comes out. Called within the block."""
    if x.shape == y.shape:
        return x
    return block.norm(name='bn_proj')(
        block.conv(y.shape[-1], (1, 1), block.strides, name='conv_proj')(x)
    )


class ResNet(nn.Module):
    """Stages of residual blocks, each with half the height and width of the one before.

    ResNet-18 has the stages (2, 2, 2, 2) of basic blocks, ResNet-50 (3, 4, 6, 3) of bottlenecks.
    Deep Residual Learning for Image Recognition, He et al. 2015, with the strides of torchvision,
    whose weights fit: see `TORCHVISION`.

    Attributes:
        stages: number of blocks in each.
        block: two convolutions of 3 x 3 ('basic'), or one between two of 1 x 1 ('bottleneck').
        num_classes: number of logits.
        features: of the first convolution and the first stage.
        stem: 'large': a convolution of 7 x 7 and a pooling, which divide height and width by four;
            'small': a convolution of 3 x 3 for images of some thirty pixels.
        momentum: of the running statistics.
        norm_groups: groups of rows that are normalised by statistics of their own in training: see
            `trainer.models.norm:GroupedBatchNorm`. With one they are those of the global batch.
        activation: after each normalisation.
        dtype: of the computation; None follows inputs and parameters.
    """

    stages: Sequence[int] = (2, 2, 2, 2)
    block: Literal['basic', 'bottleneck'] = 'basic'
    num_classes: int = 1000
    features: int = 64
    stem: Literal['large', 'small'] = 'large'
    momentum: float = 0.9
    norm_groups: int = 1
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) for images (batch, height, width, channels).

        Args:
            x: images.
            train: normalise by the batch, and let the running statistics follow.

        Raises:
            ValueError: if there is no such block or stem.
        """
        block = _select('block', self.block, basic=BasicBlock, bottleneck=BottleneckBlock)
        size, strides, pad = _select('stem', self.stem, large=(7, 2, 3), small=(3, 1, 1))
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            GroupedBatchNorm, groups=self.norm_groups, use_running_average=not train,
            momentum=self.momentum, epsilon=1e-5, dtype=self.dtype,
        )  # fmt: skip
        padding = [(pad, pad), (pad, pad)]
        x = conv(self.features, (size, size), strides, padding=padding, name='conv_init')(x)
        x = self.activation(norm(name='bn_init')(x))
        if self.stem == 'large':
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                x = block(
                    features=self.features * 2**stage,
                    strides=2 if stage > 0 and index == 0 else 1,
                    conv=conv,
                    norm=norm,
                    activation=self.activation,
                    name=f'stage{stage + 1}_block{index}',
                )(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x.mean((1, 2)))


def _select(what: str, name: str, **known: Any) -> Any:
    if name not in known:
        raise ValueError(f'{what}: {name!r} is none of {", ".join(known)}')
    return known[name]
