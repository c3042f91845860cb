# SPDX-License-Identifier: Apache-2.0
"""Residual networks (ResNets; He et al., 2015) for images of any size.

A suffix of a name says which dimensions an array has:

    B  images of a batch          C  channels, at the input of a block
    H  height in pixels           O  channels at its output
    W  width in pixels            M  channels of the convolutions before its last one
                                  F  features of an image
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax

from .norm import GroupedBatchNorm

# A layer's constructor with some arguments bound; the block passes the others.
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

# For the scale of a block's last normalization: the residual branch starts at zero, so each block
# starts as its shortcut.
_ZEROS = nn.initializers.zeros_init()


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut.

    Attributes:
        features: output channels.
        strides: strides of the first convolution, in height and width.
        conv: creates a convolution.
        norm: creates a normalization layer.
        activation: applied after each normalization.
    """

    features: int
    strides: int
    conv: Layer
    norm: Layer
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns (batch, height / strides, width / strides, features)."""
        y_BHWM = self.conv(self.features, (3, 3), self.strides, padding=1, name='conv1')(x_BHWC)
        y_BHWM = self.activation(self.norm(name='bn1')(y_BHWM))
        y_BHWO = self.conv(self.features, (3, 3), padding=1, name='conv2')(y_BHWM)
        y_BHWO = self.norm(scale_init=_ZEROS, name='bn2')(y_BHWO)
        return self.activation(_shortcut(self, x_BHWC, y_BHWO) + y_BHWO)


class BottleneckBlock(nn.Module):
    """A 3 x 3 convolution between two 1 x 1 convolutions, with a shortcut.

    Attributes:
        features: channels of the first two convolutions; the last one has four times as many.
        strides: strides of the middle convolution, in height and width.
        conv: creates a convolution.
        norm: creates a normalization layer.
        activation: applied after each normalization.
    """

    features: int
    strides: int
    conv: Layer
    norm: Layer
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns (batch, height / strides, width / strides, 4 x features)."""
        y_BHWM = self.conv(self.features, (1, 1), name='conv1')(x_BHWC)
        y_BHWM = self.activation(self.norm(name='bn1')(y_BHWM))
        y_BHWM = self.conv(self.features, (3, 3), self.strides, padding=1, name='conv2')(y_BHWM)
        y_BHWM = self.activation(self.norm(name='bn2')(y_BHWM))
        y_BHWO = self.conv(4 * self.features, (1, 1), name='conv3')(y_BHWM)
        y_BHWO = self.norm(scale_init=_ZEROS, name='bn3')(y_BHWO)
        return self.activation(_shortcut(self, x_BHWC, y_BHWO) + y_BHWO)


def _shortcut(block: Any, x_BHWC: jax.Array, y_BHWO: jax.Array) -> jax.Array:
    """Returns the block's input, projected to the shape of its output if that differs."""
    if x_BHWC.shape == y_BHWO.shape:
        return x_BHWC
    # Called in the block's compact method, so these are layers of the block.
    return block.norm(name='bn_proj')(
        block.conv(y_BHWO.shape[-1], (1, 1), block.strides, name='conv_proj')(x_BHWC)
    )


class ResNet(nn.Module):
    """Stages of residual blocks, each with half the height and width of the previous one.

    ResNet-18 has stages (2, 2, 2, 2) of basic blocks, ResNet-50 (3, 4, 6, 3) of bottlenecks. Deep
    Residual Learning for Image Recognition, He et al. 2015, with the strides of torchvision, whose
    weights can be loaded: see `TORCHVISION`.

    Attributes:
        stages: number of blocks in each stage.
        block: 'basic' for `BasicBlock`, 'bottleneck' for `BottleneckBlock`.
        num_classes: number of logits.
        features: channels of the first convolution and the first stage.
        stem: 'large': a 7 x 7 convolution and pooling, which divide height and width by four;
            'small': a 3 x 3 convolution, for images of about 30 pixels.
        momentum: momentum of the running statistics.
        norm_groups: number of groups of examples with separate statistics in training: see
            `trainer.models.norm:GroupedBatchNorm`. With 1, statistics are of the global batch.
        activation: applied after each normalization.
        dtype: dtype of the computation; None follows inputs and parameters.
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
    def __call__(self, x_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) for images (batch, height, width, channels).

        Args:
            x_BHWC: images (batch, height, width, channels).
            train: whether to normalize by the batch and update the running statistics.

        Raises:
            ValueError: for an unknown block or stem.
        """
        block = _select('block', self.block, basic=BasicBlock, bottleneck=BottleneckBlock)
        size, strides, pad = _select('stem', self.stem, large=(7, 2, 3), small=(3, 1, 1))
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            GroupedBatchNorm, groups=self.norm_groups, use_running_average=not train,
            momentum=self.momentum, epsilon=1e-5, dtype=self.dtype,
        )  # fmt: skip
        # Explicit padding as in PyTorch: with strides, 'SAME' would pad unevenly.
        padding = [(pad, pad), (pad, pad)]
        stem = conv(self.features, (size, size), strides, padding=padding, name='conv_init')
        x_BHWC = self.activation(norm(name='bn_init')(stem(x_BHWC)))
        if self.stem == 'large':
            x_BHWC = nn.max_pool(x_BHWC, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                x_BHWC = block(
                    features=self.features * 2**stage,
                    strides=2 if stage > 0 and index == 0 else 1,
                    conv=conv,
                    norm=norm,
                    activation=self.activation,
                    name=f'stage{stage + 1}_block{index}',
                )(x_BHWC)
        x_BF = x_BHWC.mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x_BF)


def _select(option: str, name: str, **choices: Any) -> Any:
    if name not in choices:
        raise ValueError(f'{option}: {name!r} is none of {", ".join(choices)}')
    return choices[name]
