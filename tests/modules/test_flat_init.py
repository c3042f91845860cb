# SPDX-License-Identifier: Apache-2.0
"""Dimension names of parameters that are initialized as matrices, as in `nn.DenseGeneral`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.modules.learning import trainer
from trainer.config.errors import UserError

INIT = nn.initializers.lecun_normal()


class Attention(nn.Module):
    """Attention with kernel names for the final dimensions, as in nanodo."""

    names: tuple[str | None, ...] = ('data', None, None)
    logical: bool = False
    named: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        naming: Any = nn.with_logical_partitioning if self.logical else nn.with_partitioning

        def init(names: Any) -> Any:
            return naming(INIT, names) if self.named else INIT

        y = nn.MultiHeadDotProductAttention(
            2, kernel_init=init(self.names), out_kernel_init=init(self.names[::-1]),
        )(x[:, None])  # fmt: skip
        return nn.DenseGeneral((4,), kernel_init=init((self.names[0], None)))(y[:, 0])


class Scanned(nn.Module):
    """The same in stacked layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = nn.scan(
            Layer, length=2, variable_axes={'params': 0}, split_rngs={'params': True},
            metadata_params={nn.PARTITION_NAME: None},
        )  # fmt: skip
        return nn.Dense(4)(layers()(x, None)[0])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> Any:
        kernel_init = nn.with_partitioning(INIT, ('data', None, None))
        return nn.DenseGeneral((2, 4), kernel_init=kernel_init)(x).reshape(x.shape), None


class Bridged(nnx.Module):
    """The same in an NNX module."""

    def __init__(self, rngs: nnx.Rngs):
        self.linen = nnx.bridge.ToNNX(Attention(), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linen(x)


class BridgedWrongNames(nnx.Module):
    """A wrong name in a Linen module within an NNX module."""

    def __init__(self, rngs: nnx.Rngs):
        self.linen = nnx.bridge.ToNNX(WrongNames(), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linen(x)


def specs(model: dict[str, Any], **options: Any) -> tuple[dict[str, Any], Any]:
    run = trainer({**model, 'target': f'{__name__}:{model["target"]}'}, steps=4, **options)
    result = run.fit()
    found = jax.tree_util.tree_leaves_with_path(result.state.params)
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): value.sharding.spec
        for path, value in found
    }, result


@pytest.mark.slow
@pytest.mark.parametrize('logical', [False, True])
def test_names_of_the_final_shape(logical: bool) -> None:
    """Parameters are sharded by their names, and have the same values as without names."""
    options: dict[str, Any] = {}
    model: dict[str, Any] = {'target': 'Attention'}
    if logical:
        model |= {'logical': True, 'names': ('embed', 'heads', None)}
        rules = (('embed', 'data'), ('heads', None))
        options['sharding'] = ({'target': 'trainer.sharding:ByName', 'rules': rules},)
    found, result = specs(model, **options)
    attention = 'MultiHeadDotProductAttention_0'
    assert found[f'{attention}/query/kernel'] == P('data', None, None)
    assert found[f'{attention}/out/kernel'] == P(None, None, 'data')
    plain = trainer({'target': f'{__name__}:Attention', 'named': False}, steps=4).fit()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.device_get(result.state.params),
        jax.device_get(plain.state.params),
    )


@pytest.mark.slow
def test_in_stacked_layers_and_bridges() -> None:
    kernel = specs({'target': 'Scanned'})[0]['ScanLayer_0/DenseGeneral_0/kernel']
    assert kernel == P(None, 'data', None, None)
    found, _ = specs({'target': 'Bridged'})
    assert found['linen/MultiHeadDotProductAttention_0/query/kernel'] == P('data', None, None)


class WrongNames(nn.Module):
    """Names more dimensions than a parameter has."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, kernel_init=nn.with_partitioning(INIT, ('data', None, None)))(x)


class OwnInit(nn.Module):
    """Unboxes a flat parameter itself."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def init(rng: jax.Array, shape: Any) -> Any:
            box = nn.with_partitioning(INIT, ('data', None, None))(rng, (8, 4))
            return box.replace_boxed(box.unbox().reshape(shape))

        return x @ self.param('kernel', init, (8, 2, 2)).reshape(8, 4)


def test_a_wrong_number_of_names() -> None:
    wrong = r"P\('data', None, None\) for an array that has 2 dimensions \(.*test_flat_init"
    for target in ('WrongNames', 'BridgedWrongNames', 'OwnInit'):
        with pytest.raises(UserError, match=wrong):
            specs({'target': target})


class StartsFrom(nn.Module):
    """Has a module in a field that is named like an initializer."""

    state_init: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.remat(nn.Dense)(4)(self.state_init(x))


@pytest.mark.slow
def test_a_module_in_a_field_named_like_an_initializer() -> None:
    layer = {'target': 'flax.linen:Dense', 'features': 8}
    found, _ = specs({'target': 'StartsFrom', 'state_init': layer})
    assert found['state_init/kernel'] == P()
