# SPDX-License-Identifier: Apache-2.0
"""Layers as PyTorch's documentation defines them, in numpy and float64: channels come first.

`w` is a mapping from the names of a state_dict to arrays of the shapes that PyTorch gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]


def double(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def linear(x: np.ndarray, w: Weights, at: str) -> np.ndarray:
    """`torch.nn.Linear`: weight (outputs, inputs)."""
    y = double(x) @ double(w[f'{at}weight']).T
    return y + w[f'{at}bias'] if f'{at}bias' in w else y


def windows(x: np.ndarray, size: tuple[int, int], stride: int) -> np.ndarray:
    """Returns (batch, channels, height, width, *size) of the windows of (batch, channels, ...)."""
    found = np.lib.stride_tricks.sliding_window_view(x, size, axis=(2, 3))
    return found[:, :, ::stride, ::stride]


def pad(x: np.ndarray, padding: int, value: float = 0.0) -> np.ndarray:
    sides = (padding, padding)
    return np.pad(double(x), ((0, 0), (0, 0), sides, sides), constant_values=value)


def conv2d(
    x: np.ndarray, w: Weights, at: str, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> np.ndarray:
    """`torch.nn.Conv2d`: weight (outputs, inputs of a group, height, width)."""
    kernel = double(w[f'{at}weight'])
    seen = windows(pad(x, padding), kernel.shape[2:], stride)
    each = [
        np.einsum('bihwkl,oikl->bohw', part, outputs)
        for part, outputs in zip(
            np.split(seen, groups, axis=1), np.split(kernel, groups), strict=True
        )
    ]
    y = np.concatenate(each, axis=1)
    return y + w[f'{at}bias'][:, None, None] if f'{at}bias' in w else y


def conv_transpose2d(x: np.ndarray, w: Weights, at: str, *, stride: int = 1) -> np.ndarray:
    """`torch.nn.ConvTranspose2d`: weight (inputs, outputs, height, width), a stamp an input."""
    kernel = double(w[f'{at}weight'])
    batch, _, height, width = x.shape
    _, outputs, tall, wide = kernel.shape
    y = np.zeros((batch, outputs, (height - 1) * stride + tall, (width - 1) * stride + wide))
    for i, j in np.ndindex(height, width):
        stamp = np.einsum('bi,iokl->bokl', double(x[:, :, i, j]), kernel)
        y[:, :, i * stride : i * stride + tall, j * stride : j * stride + wide] += stamp
    return y + w[f'{at}bias'][:, None, None]


def batch_norm(x: np.ndarray, w: Weights, at: str, *, eps: float = 1e-5) -> np.ndarray:
    """`torch.nn.BatchNorm2d` in evaluation: by its running statistics."""
    names = ('running_mean', 'running_var', 'weight', 'bias')
    mean, var, scale, shift = (double(w[at + name])[:, None, None] for name in names)
    return (x - mean) / np.sqrt(var + eps) * scale + shift


def layer_norm(x: np.ndarray, w: Weights, at: str, *, eps: float = 1e-5) -> np.ndarray:
    """`torch.nn.LayerNorm` over the last dimension."""
    x = double(x)
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normal * w[f'{at}weight'] + w[f'{at}bias']


def embedding(tokens: np.ndarray, w: Weights, at: str) -> np.ndarray:
    """`torch.nn.Embedding`: weight (tokens, features)."""
    return double(w[f'{at}weight'])[tokens]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, heads: int, mask: np.ndarray | None
) -> np.ndarray:
    """Scaled dot products of (batch, length, width), a slice of the width for each head."""
    parts = [np.stack(np.split(x, heads, axis=-1), axis=1) for x in (query, key, value)]
    scores = parts[0] @ parts[1].swapaxes(-1, -2) / math.sqrt(parts[0].shape[-1])
    if mask is not None:
        scores = np.where(mask[:, None, None, :], scores, -np.inf)
    return np.concatenate(list((softmax(scores) @ parts[2]).swapaxes(0, 1)), axis=-1)


def self_attention(x: np.ndarray, w: Weights, at: str, *, heads: int) -> np.ndarray:
    """`torch.nn.MultiheadAttention`, batch first: three projections in one tensor."""
    rows = np.split(double(w[f'{at}in_proj_weight']), 3)
    shifts = np.split(double(w[f'{at}in_proj_bias']), 3)
    query, key, value = (x @ row.T + shift for row, shift in zip(rows, shifts, strict=True))
    return linear(attend(query, key, value, heads, None), w, f'{at}out_proj.')


def avg_pool2d(
    x: np.ndarray, size: int, *, stride: int, padding: int, count_include_pad: bool
) -> np.ndarray:
    """`torch.nn.AvgPool2d`."""
    sums = windows(pad(x, padding), (size, size), stride).sum((-1, -2))
    inside = windows(pad(np.ones_like(x), padding), (size, size), stride).sum((-1, -2))
    return sums / (size * size if count_include_pad else inside)


def max_pool2d(x: np.ndarray, size: int, *, stride: int, padding: int = 0) -> np.ndarray:
    """`torch.nn.MaxPool2d`."""
    return windows(pad(x, padding, -np.inf), (size, size), stride).max((-1, -2))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def gelu(x: np.ndarray) -> np.ndarray:
    """`torch.nn.GELU`: with the error function, not its approximation."""
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
