# SPDX-License-Identifier: Apache-2.0
"""Linen's layers as `knn.Module`s, which follow `training`; `knn.convert` converts any other."""

from __future__ import annotations

import flax.linen as nn

from trainer.klinen.module import Module

# Written out instead of `knn.convert(nn.Dense)`, so that type checkers see the methods of `Module`.


class Dense(nn.Dense, Module):
    """`flax.linen.Dense`."""


class DenseGeneral(nn.DenseGeneral, Module):
    """`flax.linen.DenseGeneral`."""


class Einsum(nn.Einsum, Module):
    """`flax.linen.Einsum`."""


class Embed(nn.Embed, Module):
    """`flax.linen.Embed`."""


class Conv(nn.Conv, Module):
    """`flax.linen.Conv`."""


class ConvTranspose(nn.ConvTranspose, Module):
    """`flax.linen.ConvTranspose`."""


class BatchNorm(nn.BatchNorm, Module):
    """`flax.linen.BatchNorm`; uses the statistics of the batch in training."""


class LayerNorm(nn.LayerNorm, Module):
    """`flax.linen.LayerNorm`."""


class RMSNorm(nn.RMSNorm, Module):
    """`flax.linen.RMSNorm`."""


class GroupNorm(nn.GroupNorm, Module):
    """`flax.linen.GroupNorm`."""


class InstanceNorm(nn.InstanceNorm, Module):
    """`flax.linen.InstanceNorm`."""


class Dropout(nn.Dropout, Module):
    """`flax.linen.Dropout`; active in training only."""


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention, Module):
    """`flax.linen.MultiHeadDotProductAttention`; its dropout is active in training only."""


class Sequential(nn.Sequential, Module):
    """`flax.linen.Sequential`; passes the training flag to its layers of any kind."""


class OptimizedLSTMCell(nn.OptimizedLSTMCell, Module):
    """`flax.linen.OptimizedLSTMCell`."""


class GRUCell(nn.GRUCell, Module):
    """`flax.linen.GRUCell`."""


class RNN(nn.RNN, Module):
    """`flax.linen.RNN`."""


class Bidirectional(nn.Bidirectional, Module):
    """`flax.linen.Bidirectional`."""
