# SPDX-License-Identifier: Apache-2.0
"""The transformer: options that do not change its results, and the cache."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.command import ROOT
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.models.decoding import with_cache
from trainer.models.generation import generate
from trainer.models.transformer import Attention, Transformer
from trainer.trainer import Trainer

SMALL: dict[str, Any] = dict(vocab_size=11, layers=4, width=16, heads=2, max_length=12)
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 12))
KEY = jax.random.key(0)


def variables(model: Transformer) -> Any:
    return nn.meta.unbox(model.init(KEY, TOKENS))


def unstack_layers(params: Any) -> dict[str, Any]:
    """Converts the parameters of scanned layers to those of a loop over layers."""
    rest = {name: x for name, x in params.items() if name != 'blocks'}
    blocks = {
        f'block_{index}': jax.tree.map(lambda x, i=index: x[i], params['blocks'])
        for index in range(4)
    }
    return {**rest, **blocks}


def gradient(model: Transformer, params: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        return (model.apply({'params': params}, TOKENS).astype(jnp.float32) ** 2).mean()

    return jax.value_and_grad(loss)(params)


OPTIONS: list[dict[str, Any]] = [
    {'unroll': 2}, {'remat': 'full'}, {'remat': 'dots_saveable'},
    {'remat': 'nothing_saveable', 'unroll': 4},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('options', OPTIONS)
def test_options_of_the_layers(options: dict[str, Any]) -> None:
    """Scanned layers, unrolled or rematerialized, equal those of a loop."""
    scanned = Transformer(**SMALL, scan_layers=True, **options)
    params = variables(scanned)['params']
    remat = {'remat': options['remat']} if 'remat' in options else {}
    value, grads = gradient(scanned, params)
    plain, theirs = gradient(Transformer(**SMALL), unstack_layers(params))
    again, _ = gradient(Transformer(**SMALL, **remat), unstack_layers(params))
    assert float(value) == pytest.approx(float(plain), rel=1e-5)
    assert float(again) == pytest.approx(float(plain), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        unstack_layers(grads),
        theirs,
    )


@pytest.mark.slow
def test_scanned_layers_have_different_dropout_masks() -> None:
    """Each layer has its own masks, for attention and for the MLP."""
    model = Transformer(**SMALL, scan_layers=True, dropout_rate=0.5)
    _, state = model.apply(
        variables(model), TOKENS, train=True, rngs={'dropout': KEY},
        capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
        mutable=['intermediates'],
    )  # fmt: skip
    calls = state['intermediates']['blocks']['Dropout_0']['__call__']
    masks = np.concatenate([np.asarray(x) != 0 for x in calls]).reshape(8, -1)
    assert len({mask.tobytes() for mask in masks}) == 8
    assert np.abs(masks.mean(1) - 0.5).max() < 0.1


def program(**options: Any) -> Any:
    """Returns the lowered gradient of a model of 32 layers."""
    model = Transformer(**{**SMALL, 'layers': 32}, **options)
    params = jax.eval_shape(lambda: variables(model)['params'])

    def loss(params: Any) -> jax.Array:
        return (model.apply({'params': params}, TOKENS) ** 2).mean()

    return jax.jit(jax.grad(loss)).lower(params)


@pytest.mark.slow
def test_options_reduce_program_size_and_memory() -> None:
    """A scan makes the program many times smaller, remat saves memory."""
    loop, scan = (len(program(scan_layers=form).as_text()) for form in (False, True))
    assert scan < loop / 8
    unrolled = len(program(scan_layers=True, unroll=8).as_text())
    assert 2 * scan < unrolled < loop / 2
    kept, some, none = (
        program(scan_layers=True, remat=remat).compile().memory_analysis().temp_size_in_bytes
        for remat in ('none', 'dots_saveable', 'full')
    )
    assert none < 0.5 * kept
    assert none < some < kept


REFUSED = [
    ({'positions': 'sincos'}, r"positions: 'sincos' is none of learned, rotary"),
    ({'positions': 'rotary', 'heads': 16}, r'rotary positions need an even number of features'),
    ({'remat': 'everything'}, r"remat='everything' is none of 'none', 'full' and .*dots_saveable"),
    ({'remat': 'save_only_these_names'}, r"remat='save_only_these_names' is none of"),
    ({'heads': 3}, r'heads=3 does not divide width=16'),
    ({'heads': 0}, r'heads=0 does not divide width=16'),
]


@pytest.mark.parametrize(('options', 'message'), REFUSED)
def test_invalid_options_are_errors(options: dict[str, Any], message: str) -> None:
    """They are refused when the model is created; the error has the path in the config."""
    with pytest.raises(ValueError, match=message):
        Transformer(**{**SMALL, **options})
    given = {f'model__{name}': value for name, value in options.items()}
    with pytest.raises(
        UserError, match=rf'^config\.model: trainer\.models\.transformer:\w+ .*{message}'
    ):
        load_and_build(str(ROOT / 'configs' / 'lm.py:bytes'), model__width=16, **given)


@pytest.mark.slow
@pytest.mark.parametrize('positions', ['learned', 'rotary'])
@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('dtype', [None, jnp.bfloat16])
def test_cached_decoding_equals_a_full_pass(scan_layers: bool, dtype: Any, positions: Any) -> None:
    """Token by token, after a prompt of five tokens, the logits equal those of one pass."""
    options: dict[str, Any] = dict(positions=positions, tied=positions == 'rotary')
    model = Transformer(**SMALL, scan_layers=scan_layers, dtype=dtype, **options)
    params = variables(model)['params']
    whole = model.apply({'params': params}, TOKENS)
    decoder = model.clone(decode=True)
    state = {'cache': jax.tree.map(jnp.zeros_like, variables(decoder)['cache'])}
    kept = [x for x in jax.tree.leaves(state) if x.ndim > 1]
    assert {x.dtype for x in kept} == {jnp.dtype(dtype or jnp.float32)}
    found = []
    for tokens in (TOKENS[:, :5], *np.split(TOKENS[:, 5:], 7, axis=1)):
        logits, state = decoder.apply({'params': params, **state}, tokens, mutable=['cache'])
        found.append(logits)
    assert state['cache']['index'].tolist() == [12] * 3
    tolerance = {'atol': 2e-5} if dtype is None else {'atol': 3e-2}
    np.testing.assert_allclose(
        np.concatenate(found, axis=1).astype('f4'), np.asarray(whole, 'f4'), **tolerance
    )


@pytest.mark.slow
def test_the_cache_of_flax_s_own_attention() -> None:
    """Keys, values and an index; five steps equal one causal pass."""
    x = np.random.default_rng(1).normal(size=(2, 5, 8)).astype('f4')
    layer = nn.MultiHeadDotProductAttention(num_heads=2)
    params = layer.init(KEY, x)['params']
    whole = layer.apply({'params': params}, x, mask=nn.make_causal_mask(x[:, :, 0]))
    decoder = layer.clone(decode=True)
    state = {'cache': decoder.init(KEY, x)['cache']}
    assert set(state['cache']) == {'cached_key', 'cached_value', 'cache_index'}
    found = []
    for step in range(5):
        y, state = decoder.apply(
            {'params': params, **state}, x[:, step : step + 1], mutable=['cache']
        )
        found.append(y)
    assert int(state['cache']['cache_index']) == 5
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=1e-5)


def test_half_precision_softmax_is_computed_in_float32() -> None:
    model = Attention(heads=2, dtype=jnp.bfloat16)
    x, mask = jnp.ones((1, 4, 8), jnp.bfloat16), jnp.ones((1, 1, 4, 4), bool)
    text = str(jax.make_jaxpr(lambda: model.init_with_output(KEY, x, mask)[0])())
    assert re.findall(r':(\w+)\[[\d,]*\] = exp ', text) == ['f32']


@pytest.mark.slow
def test_a_trained_model_generates_text() -> None:
    """A short run on the standard library's source generates text of its alphabet."""
    config = load_and_build(
        str(ROOT / 'configs' / 'lm.py:bytes'), train_for='60 steps', evals={},
        model__layers=1, model__width=64, model__remat='dots_saveable', model__scan_layers=True,
    )  # fmt: skip
    trainer = Trainer(config)
    state = trainer.fit().state
    module = config.model.module  # type: ignore[attr-defined]
    prompt = jnp.asarray([list(b'import ')])
    decoder = with_cache(module.clone(decode=True), {'params': state.params}, 1, 27)
    tokens, _ = generate(*decoder, prompt, count=20)
    found = bytes(np.asarray(tokens)[0].tolist())
    assert len(found) == 20 and max(found) < 128
