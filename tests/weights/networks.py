# SPDX-License-Identifier: Apache-2.0
"""The networks of `torch_networks` in Flax."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np

from trainer.data.sources import ArraySource

NAMES = (
    (r'^layer(\d)/(\d)/', r'layer\1_\2/'),
    ('/downsample/0/', '/downsample_conv/'),
    ('/downsample/1/', '/downsample_bn/'),
)


class Images(ArraySource):
    """A few random images."""

    def __init__(self) -> None:
        image = np.random.default_rng(0).normal(size=(32, 32, 32, 3)).astype('f4')
        super().__init__({'image': image, 'label': np.zeros(32, 'i4')})


def _norm(name: str, train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)


class Basic(nn.Module):
    """Two convolutions and a shortcut."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def conv(name: str, size: int, stride: int, pad: int) -> nn.Conv:
            return nn.Conv(
                self.features, (size, size), stride, padding=pad, use_bias=False, name=name
            )

        y = nn.relu(_norm('bn1', train)(conv('conv1', 3, self.stride, 1)(x)))
        y = _norm('bn2', train)(conv('conv2', 3, 1, 1)(y))
        if y.shape != x.shape:
            x = conv('downsample_conv', 1, self.stride, 0)(x)
            x = _norm('downsample_bn', train)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-18."""

    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(64, (7, 7), 2, padding=3, use_bias=False, name='conv1')(x)
        x = nn.relu(_norm('bn1', train)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, features in enumerate((64, 128, 256, 512)):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Basic(features, stride, name=f'layer{stage + 1}_{block}')(x, train)
        return nn.Dense(self.classes, name='fc')(x.mean((1, 2)))


class Flat(nn.Module):
    """A dense layer after a convolution, flattened in the order of Flax."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(5, (1, 1), name='conv')(x)
        return nn.Dense(2, name='fc')(x.reshape(x.shape[0], -1))


class ViT(nn.Module):
    """A layer of a transformer, with the names of `torch.nn.TransformerEncoderLayer`."""

    norm_first: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(num_heads=4, name='self_attn')
        linear1, linear2 = nn.Dense(32, name='linear1'), nn.Dense(x.shape[-1], name='linear2')
        norm1, norm2 = (nn.LayerNorm(epsilon=1e-5, name=name) for name in ('norm1', 'norm2'))

        def mlp(x: jax.Array) -> jax.Array:
            return linear2(nn.gelu(linear1(x), approximate=False))

        if self.norm_first:
            x = x + attention(norm1(x))
            return x + mlp(norm2(x))
        x = norm1(x + attention(x))
        return norm2(x + mlp(x))
