# SPDX-License-Identifier: Apache-2.0
"""Less common features of Linen that the guides describe."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

from tests.modules.learning import train_and_check

KEY = jax.random.key(0)
X = np.random.default_rng(4).normal(size=(3, 4)).astype('f4')


@pytest.mark.slow
def test_shapes_of_branches() -> None:
    """The shapes in the guide, and statistics over a named axis."""
    x = np.random.default_rng(0).normal(size=(3, 4, 4)).astype('f4')

    def dense(axis: int | None, split: bool) -> Any:
        layer = nn.vmap(
            nn.Dense, in_axes=0, out_axes=0, variable_axes={'params': axis},
            split_rngs={'params': split},
        )  # fmt: skip
        return layer(5).init_with_output(KEY, x)

    y, shared = dense(None, False)
    assert y.shape == (3, 4, 5) and shared['params']['kernel'].shape == (4, 5)
    y, separate = dense(0, True)
    assert y.shape == (3, 4, 5) and separate['params']['kernel'].shape == (3, 4, 5)
    assert len(np.unique(separate['params']['kernel'])) == 60

    def norm(axis_name: str | None) -> Any:
        layer = nn.vmap(
            nn.BatchNorm,
            in_axes=0,
            out_axes=0,
            axis_name='branch',
            variable_axes={'params': None, 'batch_stats': 0},
            split_rngs={'params': False},
        )(use_running_average=False, axis_name=axis_name)
        return layer.apply(layer.init(KEY, x), x, mutable=['batch_stats'])[0]

    np.testing.assert_allclose(norm('branch').mean((0, 1)), np.zeros(4), atol=1e-5)
    assert np.abs(norm('branch').mean(1)).max() > 0.1
    np.testing.assert_allclose(norm(None).mean(1), np.zeros((3, 4)), atol=1e-5)


class Cumulative(nn.Module):
    """A cumulative sum in either direction, and a count that the scan carries."""

    reverse: bool = False

    @nn.compact
    def __call__(self, xs: jax.Array) -> Any:
        def body(module: nn.Module, carry: jax.Array, x: jax.Array) -> Any:
            count = module.variable('counts', 'steps', jnp.zeros, (), jnp.int32)
            count.value += 1
            return carry + x, carry + x

        scan = nn.scan(
            body, variable_carry='counts', split_rngs={}, in_axes=1, out_axes=1,
            reverse=self.reverse,
        )  # fmt: skip
        return scan(self, jnp.zeros(xs.shape[0]), xs)


def test_reverse_scans_with_carried_variables() -> None:
    """They cannot be created within the scan; `in_axes` and `reverse` apply to the data."""
    with pytest.raises(TypeError, match='same pytree structure'):
        Cumulative().init(KEY, X)
    started = {'counts': {'steps': jnp.int32(0)}}
    for reverse in (False, True):
        (last, ys), new = Cumulative(reverse).apply(started, X, mutable=['counts'])
        order = slice(None, None, -1) if reverse else slice(None)
        np.testing.assert_allclose(ys[:, order], np.cumsum(X[:, order], 1), rtol=1e-5)
        np.testing.assert_allclose(last, X.sum(1), rtol=1e-5)
        assert int(new['counts']['steps']) == 4


def test_data_transform_of_a_scan() -> None:
    """`data_transform` changes the variables of each iteration."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> Any:
            return nn.Dense(4, use_bias=False)(x), None

    def stack(**options: Any) -> Any:
        axes = {'params': 0}
        scan = nn.scan(Layer, variable_axes=axes, split_rngs={'params': True}, length=2, **options)
        return scan()

    def double(variables: Any, rngs: Any) -> Any:
        return jax.tree.map(lambda x: 2 * x, variables), rngs

    variables = stack().init(KEY, X, None)
    once = stack().apply(variables, X, None)[0]
    twice = stack(data_transform=double).apply(variables, X, None)[0]
    np.testing.assert_allclose(twice, 4 * once, rtol=1e-5)


class Heads(nn.Module):
    """One of several heads, selected by a traced number."""

    def setup(self) -> None:
        self.heads = [nn.Dense(4), nn.Dense(4), nn.Dense(4)]

    def __call__(self, x: jax.Array, index: jax.Array | int = 1) -> jax.Array:
        def head(number: int) -> Any:
            return lambda module, x: module.heads[number](x)

        branches = [head(number) for number in range(3)]
        if self.is_initializing():
            for branch in branches:
                branch(self, x)
        return nn.switch(index, branches, self, x)


@pytest.mark.slow
def test_a_switch_of_heads() -> None:
    """Each head has parameters from the start; the number selects one; and it trains."""
    variables = Heads().init(KEY, X)
    assert set(variables['params']) == {'heads_0', 'heads_1', 'heads_2'}
    for index in range(3):
        chosen = jax.jit(Heads().apply)(variables, X, index)
        kernel = variables['params'][f'heads_{index}']['kernel']
        np.testing.assert_allclose(chosen, X @ kernel, rtol=1e-4, atol=1e-5)
    state = train_and_check({'target': f'{__name__}:Heads'})
    biases = [np.abs(state.params[f'heads_{index}']['bias']).max() for index in range(3)]
    assert biases[1] > 0 and biases[0] == biases[2] == 0


class Product(nn.Module):
    one: nn.Module
    two: nn.Module

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.one(x) * self.two(x)


class Pulled(nn.Module):
    """Two modules passed to a third, and the gradients of the sum of their product."""

    several: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        product = Product(nn.Dense(4, name='one'), nn.Dense(4, name='two'))
        y, pull = nn.vjp(lambda m, x: m(x), product, x, multi_scope=self.several)
        grads, slope = pull(jnp.ones_like(y))
        return y, grads, slope


def test_vjp_of_several_modules() -> None:
    """`vjp` returns the gradients of all of them with `multi_scope`, and raises without."""
    variables = Pulled().init(KEY, X)
    _, grads, slope = Pulled().apply(variables, X)

    def total(variables: Any, x: jax.Array) -> jax.Array:
        return Pulled().apply(variables, x)[0].sum()

    expected, by_input = jax.grad(total, argnums=(0, 1))(variables, X)
    np.testing.assert_allclose(slope, by_input, rtol=1e-4, atol=1e-5)
    found = dict(zip(('one', 'two'), (group['params'] for group in grads[:2]), strict=True))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        expected['params'],
    )
    with pytest.raises(NotImplementedError, match='Modules passed as arguments'):
        Pulled(several=False).apply(variables, X)


def test_cross_attention() -> None:
    """Masks, dropout and sown attention weights."""
    memory = np.random.default_rng(1).normal(size=(2, 6, 8)).astype('f4')
    x = np.random.default_rng(2).normal(size=(2, 3, 8)).astype('f4')
    layer = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.5, deterministic=True)
    variables = layer.init(KEY, x, memory)
    mask = np.ones((2, 1, 3, 6), bool)
    mask[..., 4:] = False
    y, sown = layer.apply(
        variables, x, memory, mask=mask, sow_weights=True, mutable=['intermediates']
    )
    (weights,) = sown['intermediates']['attention_weights']
    assert y.shape == (2, 3, 8) and weights.shape == (2, 2, 3, 6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not weights[..., 4:].any()
    np.testing.assert_allclose(
        y, layer.apply(variables, x, np.where(np.arange(6)[:, None] < 4, memory, 9), mask=mask),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    drawn = layer.clone(deterministic=False).apply(variables, x, memory, rngs={'dropout': KEY})
    assert not np.allclose(drawn, layer.apply(variables, x, memory))


def test_names_follow_the_order_of_calls() -> None:
    """A layer that only one branch creates shifts the names after it."""

    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, wide: bool) -> jax.Array:
            if wide:
                x = nn.Dense(8)(x)
            return nn.Dense(4)(x)

    class Correct(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, wide: bool) -> jax.Array:
            if wide:
                x = nn.Dense(8, name='widen')(x)
            return nn.Dense(4, name='last')(x)

    wrong = Wrong().init(KEY, X, False)
    with pytest.raises(errors.ScopeParamShapeError):
        Wrong().apply(wrong, X, True)
    correct = Correct().init(KEY, X, False)['params']
    wide = Correct().init(KEY, X, True)['params']
    assert set(wide) == {'widen', 'last'} and set(correct) == {'last'}


def test_two_compact_methods() -> None:
    """A class may have several; each creates its own submodules."""

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(4, name='one')(x)

        @nn.compact
        def other(self, x: jax.Array) -> jax.Array:
            return nn.Dense(5, name='two')(x)

    assert set(Both().init(KEY, X)['params']) == {'one'}
    assert set(Both().init(KEY, X, method='other')['params']) == {'two'}


def test_parameters_that_depend_on_values() -> None:
    """Parameters that depend on values of the input cannot be created from its shape.

    Newer versions of Flax silently create them from zeros.
    """

    class Data(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x - self.param('centre', lambda key: x.mean(0))

    try:
        made = Data().lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype))
    except errors.LazyInitError:
        pass
    else:
        assert not np.allclose(made['params']['centre'], X.mean(0))
    np.testing.assert_allclose(Data().init(KEY, X)['params']['centre'], X.mean(0), rtol=1e-6)


class Peak(nn.Module):
    """Divides by the largest value seen in training."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.is_initializing():
            self.put_variable('seen', 'peak', jnp.ones(()))
        elif train:
            peak = jnp.maximum(self.get_variable('seen', 'peak'), jnp.abs(x).max())
            self.put_variable('seen', 'peak', peak)
        return nn.Dense(4)(x / self.get_variable('seen', 'peak'))


@pytest.mark.slow
def test_put_variable() -> None:
    """Without a declaration; the trainer treats them like any other."""
    state = train_and_check({'target': f'{__name__}:Peak'}, steps=150)
    assert float(state.collections['seen']['peak']) > 2


def test_sequential_layers_that_return_tuples_and_dicts() -> None:
    """`Sequential` passes a tuple as positional and a dict as keyword arguments."""

    class Split(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
            return {'b': nn.Dense(2)(x), 'a': x}

    class Join(nn.Module):
        def __call__(self, *, a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.concatenate([a, b], -1)

    y = nn.Sequential([Split(), Join()]).init_with_output(KEY, X)[0]
    assert y.shape == (3, 6)
    np.testing.assert_array_equal(y[:, :4], X)
