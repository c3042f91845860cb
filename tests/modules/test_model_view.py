# SPDX-License-Identifier: Apache-2.0
"""The model as a task calls it: methods, submodules, fields, and views that share its state."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.modules.examples import Block, Normed, X, bind, everything, init, same
from trainer.config.errors import UserError
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys


def test_methods_and_submodules() -> None:
    model = bind(Normed(), task=everything)
    dense, inner = model.params['dense'], model.params['block']['inner']
    np.testing.assert_allclose(model.encode(X), X @ dense['kernel'] + dense['bias'], rtol=1e-6)
    assert same(model.dense(X), model.encode(X))
    np.testing.assert_allclose(model.block.inner(X), X @ inner['kernel'], rtol=1e-6)
    assert same(model.block(X), model.block.inner(X))
    assert not same(model.noisy(X), X)
    assert same(bind(Normed(), 'eval', task=everything).noisy(X), X)
    with pytest.raises(AttributeError, match='nothing_such'):
        model.nothing_such(X)


def test_collections_chain_through_every_view() -> None:
    """A call of any view changes the collections that the next call of any view sees."""
    model = bind(Normed(), task=everything, ema=init(Normed(), everything)['params'])
    views = (model, model.ema, model.stop_gradient('.*'), model.ema.stop_gradient('dense.*'))
    batch = model.dense(X).mean(0)
    for calls, view in enumerate(views, start=1):
        view(X)
        expected = batch * (1 - 0.5**calls)
        for other in views:
            mean = other.collections['batch_stats']['norm']['mean']
            np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_calls_of_all_views_draw_different_numbers() -> None:
    model = bind(Normed(), task=everything, ema=init(Normed(), everything)['params'])
    views = (model, model, model.ema, model.stop_gradient('norm/.*'), model)
    masks = [np.asarray(view.drop(jnp.ones((8, 16)), deterministic=False)) for view in views]
    assert len({mask.tobytes() for mask in masks}) == len(views)
    again = bind(Normed(), task=everything)
    assert same(again.drop(jnp.ones((8, 16)), deterministic=False), masks[0])


def test_views_differ_in_their_parameters_only() -> None:
    average = jax.tree.map(jnp.zeros_like, init(Normed(), everything)['params'])
    model = bind(Normed(), 'eval', task=everything, ema=average)
    assert same(model.ema.encode(X), jnp.zeros((3, 4)))
    assert not same(model.encode(X), jnp.zeros((3, 4)))
    assert same(model.stop_gradient('dense/kernel').encode(X), model.encode(X))
    with pytest.raises(ValueError, match=r'set config\.ema\.decay'):
        _ = bind(Normed(), task=everything).ema


def test_stop_gradient_matches_full_paths() -> None:
    variables, keys = init(Normed(), everything), Keys(seed=0, mode='train')

    def loss(params: Any, pattern: str) -> Any:
        model = as_functional(Normed()).bind({**variables, 'params': params}, keys)
        return model.stop_gradient(pattern).encode(X).sum()

    grads = jax.grad(loss)(variables['params'], 'dense/kernel')
    assert not grads['dense']['kernel'].any()
    assert grads['dense']['bias'].all()
    for part_of_a_path in ('dense', 'ense/kernel'):
        with pytest.raises(UserError, match=r'no parameter.*whole path, such as .*dense/kernel'):
            loss(variables['params'], part_of_a_path)


def test_keys_by_name() -> None:
    model, other = bind(Hidden()), bind(Hidden(), 'eval')
    assert model.rng('noise') != model.rng('other')
    assert model.rng('noise') == bind(Hidden()).rng('noise')
    assert model.rng('noise') != other.rng('noise')


class Parts(nn.Module):
    """Submodules in a list and in a dict, and no `__call__`."""

    width: int = 5
    activation: Any = nn.relu

    def setup(self) -> None:
        self.layers = [nn.Dense(self.width), nn.Dense(2)]
        self.heads = {'mean': nn.Dense(1), 'block': Block()}

    def embed(self, x: Any) -> Any:
        return self.layers[0](x)


def test_submodules_in_lists_and_dicts_and_plain_fields() -> None:
    def task(model: Any, batch: Any) -> Any:
        return model.embed(batch['x']), [
            model.heads[name](batch['x']) for name in ('mean', 'block')
        ]

    model = bind(Parts(), task=task)
    assert same(model.layers[0](X), model.embed(X))
    assert model.heads['mean'](X).shape == (3, 1)
    assert same(model.heads['block'].inner(X), model.heads['block'](X))
    assert (model.width, bind(Parts(width=7), task=task).width) == (5, 7)
    assert same(model.activation(-X), jnp.zeros_like(X))


def test_submodules_of_compact_methods_have_no_name() -> None:
    with pytest.raises(AttributeError, match='Dense_0'):
        bind(Hidden()).Dense_0(X)


class Hidden(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2)(x)


def test_collections_are_returned_as_copies() -> None:
    model = bind(Normed())
    read = model.collections
    read.pop('batch_stats')
    assert set(model.collections) == {'batch_stats'}


class Decoder(nn.Module):
    """One layer of attention with a cache."""

    decode: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = None if self.decode else nn.make_causal_mask(x[..., 0])
        return nn.MultiHeadDotProductAttention(num_heads=2, decode=self.decode)(x, mask=mask)


SEQUENCES = jax.random.normal(jax.random.key(1), (3, 5, 4))


def decode(model: Any, sequences: jax.Array = SEQUENCES) -> jax.Array:
    """Returns what a model returns for one position after the other, in a loop."""

    def step(cache: Any, x: jax.Array) -> Any:
        decoder = model.with_collections(cache=cache)
        y = decoder(x[:, None])
        return decoder.collections['cache'], y[:, 0]

    cache = model.fresh_collections(sequences)['cache']
    _, outputs = jax.lax.scan(step, cache, sequences.swapaxes(0, 1))
    return outputs.swapaxes(0, 1)


def bind_decoder() -> Any:
    variables = init(Decoder(), lambda model, batch: model(SEQUENCES))
    return as_functional(Decoder(decode=True)).bind(variables, Keys(seed=0, mode='eval'))


def test_a_model_with_a_cache_decodes_in_a_loop() -> None:
    model = bind_decoder()
    full = Decoder().apply({'params': model.params}, SEQUENCES)
    np.testing.assert_allclose(jax.jit(decode, static_argnums=0)(model), full, atol=1e-5)
    assert model.collections == {}


def test_a_fresh_cache_is_as_long_as_the_inputs() -> None:
    model = bind_decoder()
    (attention,) = model.fresh_collections(SEQUENCES)['cache'].values()
    assert attention['cached_key'].shape == (3, 5, 2, 2)
    assert attention['cache_index'] == 0


def test_decoding_creates_all_parameters_in_initialization() -> None:
    variables = init(Decoder(decode=True), lambda model, batch: decode(model))
    assert jax.tree.structure(variables['params']) == jax.tree.structure(bind_decoder().params)
    (attention,) = variables['cache'].values()
    assert attention['cached_key'].shape == (3, 5, 2, 2)


def test_a_model_with_other_collections_leaves_the_first_one_alone() -> None:
    model = bind(Normed(), task=everything)
    before = model.collections['batch_stats']
    other = jax.tree.map(lambda x: x + 1, before)
    view = model.with_collections(batch_stats=other)
    view(X)
    assert model.collections['batch_stats'] is before
    changed = view.collections['batch_stats']['norm']['mean']
    np.testing.assert_allclose(changed, 0.5 + 0.5 * model.dense(X).mean(0), rtol=1e-5)
    # In evaluation too, a call may change what was given.
    evaluated = bind(Normed(), 'eval', task=everything).with_collections(batch_stats=other)
    evaluated(X)
    assert same(evaluated.collections['batch_stats']['norm']['mean'], other['norm']['mean'])


def test_a_cache_of_another_trace_is_not_changed() -> None:
    model = bind_decoder()
    outside = model.with_collections(**model.fresh_collections(SEQUENCES))

    def step(carry: None, x: jax.Array) -> Any:
        return carry, outside(x[:, None])

    with pytest.raises(UserError, match=r'within a loop .* cache\. .* model\.with_collections'):
        jax.lax.scan(step, None, SEQUENCES.swapaxes(0, 1))


def test_only_linen_modules_create_collections_by_a_call() -> None:
    model = as_functional(nnx.Linear(4, 2, rngs=nnx.Rngs(0))).bind(
        {'params': {'kernel': jnp.zeros((4, 2)), 'bias': jnp.zeros(2)}}, Keys(seed=0, mode='eval')
    )
    with pytest.raises(UserError, match=r'model\.fresh_collections: only a Linen module'):
        model.fresh_collections(X)
