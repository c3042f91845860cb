# SPDX-License-Identifier: Apache-2.0
"""Klinen: Linen models as objects that hold their variables.

    from trainer import klinen as knn

    class AutoEncoder(knn.Module):
        encoder: nn.Module
        decoder: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.decoder(knn.Dropout(0.1)(self.encoder(x)))

    model = AutoEncoder(nn.Dense(8), knn.BatchNorm()).init_bind(jax.random.key(0), x)
    y = model.eval()(x)                         # evaluation mode: no random numbers
    model = model.with_rng(1)                   # training mode: dropout draws from this key
    y, model = model.call_with_updates(x)       # with the new batch statistics
    z = model.encoder(x)                        # any submodule, called separately
    y, values = model.eval().call_with_intermediates(x)  # fields knn.Intermediate[...]
    y = jax.jit(lambda model, x: model.eval()(x))(model, x)

A bound model is immutable: every method returns a value or a copy. It is a pytree whose children
are its parameters, its other collections and its random keys, if any.

Only the parameters, 'perturbations' and the scales of fp8 layers have gradients. Those of all other
collections are zero, so that an update of the whole model leaves statistics unchanged. To
differentiate with respect to a collection of your own, use `module, variables = model.unbind()` and
Linen's `module.apply`.
"""

from trainer.klinen.adapter import ADAPTER
from trainer.klinen.bound import bind
from trainer.klinen.intermediates import Intermediate, Intermediates
from trainer.klinen.layers import (
    RNN,
    BatchNorm,
    Bidirectional,
    Conv,
    ConvTranspose,
    Dense,
    DenseGeneral,
    Dropout,
    Einsum,
    Embed,
    GroupNorm,
    GRUCell,
    InstanceNorm,
    LayerNorm,
    MultiHeadDotProductAttention,
    OptimizedLSTMCell,
    RMSNorm,
    Sequential,
)
from trainer.klinen.module import Module, convert
from trainer.modules.adapters import register

__all__ = [
    'RNN',
    'BatchNorm',
    'Bidirectional',
    'Conv',
    'ConvTranspose',
    'Dense',
    'DenseGeneral',
    'Dropout',
    'Einsum',
    'Embed',
    'GRUCell',
    'GroupNorm',
    'InstanceNorm',
    'Intermediate',
    'Intermediates',
    'LayerNorm',
    'Module',
    'MultiHeadDotProductAttention',
    'OptimizedLSTMCell',
    'RMSNorm',
    'Sequential',
    'bind',
    'convert',
]

# Registered at import: a Klinen module exists only if this package was imported, and
# `trainer.modules` must not import `trainer.klinen`.
register(ADAPTER)
