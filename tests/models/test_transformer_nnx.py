# SPDX-License-Identifier: Apache-2.0
"""The transformer in NNX equals that in Linen; positions and tied embeddings of both."""

from __future__ import annotations

import math
import pathlib
import re
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from tests.command import ROOT
from tests.marks import slow_except
from trainer.experiment import load_and_build
from trainer.models import transformer, transformer_nnx
from trainer.models.decoding import with_own_cache, without_cache
from trainer.models.generation import generate
from trainer.models.transformer import Transformer
from trainer.models.transformer_nnx import Transformer as NNXTransformer
from trainer.trainer import Trainer

SMALL: dict[str, Any] = dict(vocab_size=11, layers=2, width=16, heads=2, max_length=8)
OPTIONS = [
    {'positions': 'rotary', 'tied': True},
    {'positions': 'learned', 'tied': False},
    {'positions': 'learned', 'tied': True, 'mlp_width': 6},
]
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 8), np.int32)
PACKED: dict[str, Any] = {
    'segments': np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8], np.int32),
    'positions': np.array([[0, 1, 2, 0, 1, 2, 3, 0], [*range(8)]], np.int32),
}
# As the page about language models shows it.
RENAME = ((r'^block_(\d+)/', r'blocks/\1/'),)


def random_parameters(model: Transformer) -> dict[str, np.ndarray]:
    """Returns random parameters by path, far from uniform predictions."""
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS))['params']
    rng = np.random.default_rng(1)
    flat = traverse_util.flatten_dict(shapes, sep='/')
    return {path: rng.normal(size=x.shape, scale=0.3).astype('f4') for path, x in flat.items()}


def loss(logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


@pytest.mark.parametrize('options', slow_except(OPTIONS[:1], OPTIONS))
def test_nnx_equals_linen(options: dict[str, Any]) -> None:
    """Names and shapes of the parameters, the loss of packed sequences, and its gradient."""
    linen = Transformer(**SMALL, **options)
    model = NNXTransformer(**SMALL, **options, rngs=nnx.Rngs(0))
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    flat = random_parameters(linen)
    [(pattern, replacement)] = RENAME
    renamed = {re.sub(pattern, replacement, path): x for path, x in flat.items()}
    mine = traverse_util.flatten_dict(nnx.to_pure_dict(state))
    shapes = {'/'.join(map(str, path)): x.shape for path, x in mine.items()}
    assert shapes == {path: x.shape for path, x in renamed.items()}

    copied = {path: renamed['/'.join(map(str, path))] for path in mine}
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(copied))

    def run_linen(params: Any) -> jax.Array:
        return loss(linen.apply({'params': params}, TOKENS, **PACKED))

    def run_nnx(params: Any) -> jax.Array:
        return loss(nnx.merge(graph, params, rest)(TOKENS, **PACKED))

    params = traverse_util.unflatten_dict(flat, sep='/')
    expected, gradient = jax.jit(jax.value_and_grad(run_linen))(params)
    found, other = jax.jit(jax.value_and_grad(run_nnx))(state)
    assert found == pytest.approx(float(expected), rel=1e-5)
    wanted = traverse_util.flatten_dict(gradient, sep='/')
    for path, x in traverse_util.flatten_dict(nnx.to_pure_dict(other)).items():
        name = re.sub(r'^blocks/(\d+)/', r'block_\1/', '/'.join(map(str, path)))
        np.testing.assert_allclose(x, wanted[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('options', slow_except(OPTIONS[:1], OPTIONS[:2]))
def test_its_cache_changes_nothing(options: dict[str, Any]) -> None:
    """The same tokens as without, for prompts of different lengths."""
    model = NNXTransformer(**SMALL, **options, dropout_rate=0.5, rngs=nnx.Rngs(0))
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    model = nnx.merge(graph, jax.tree.map(lambda x: 3 * x, state), rest)
    model.eval()
    prompt, lengths = TOKENS[:, :3], np.array([1, 3])
    found, expected = (
        generate(*make(model, 2, 8), prompt, count=5, lengths=lengths).tokens
        for make in (with_own_cache, without_cache)
    )
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 2


def test_a_cache_that_is_too_short_is_an_error() -> None:
    model = NNXTransformer(**SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match='9 tokens, but max_length is 8'):
        with_own_cache(model, 2, 9)
    with pytest.raises(ValueError, match=r'2 prompts, 9 tokens with .* batch=2, length=8'):
        generate(*with_own_cache(model, 2, 8), TOKENS[:, :4], count=5)


@pytest.mark.slow
def test_both_train_to_the_same_loss(tmp_path: pathlib.Path) -> None:
    """From the same file of parameters, through the same config."""
    small = {'layers': 2, 'width': 16, 'heads': 2, 'max_length': 32, 'dropout_rate': 0.0}
    changes: dict[str, Any] = {f'model__{name}': x for name, x in small.items()}
    flat = random_parameters(Transformer(vocab_size=256, **small))
    path = tmp_path / 'parameters.msgpack'
    tree = {'params': traverse_util.unflatten_dict(flat, sep='/')}
    path.write_bytes(flax.serialization.to_bytes(tree))
    found = []
    for words, rename in (('bytes', ()), ('bytes,nnx', RENAME)):
        experiment = load_and_build(
            f'{ROOT}/configs/lm.py:{words}', **changes, train_for='20 steps', evals={},
            log__every='1 steps', data__source__seq_len=32, data__source__limit=400,
            optimizer__learning_rate__peak_value=0.01,
            init_from={'path': str(path), 'rename': rename},
        )  # fmt: skip
        found.append(Trainer(experiment).fit().history['train/loss'].values)
    np.testing.assert_allclose(*found, rtol=2e-4)
    assert found[0][-1] < 0.9 * found[0][0]


@pytest.mark.parametrize('rotate', [transformer.rotate, transformer_nnx.rotate])
def test_rotation(rotate: Any) -> None:
    """By its definition, one pair of numbers at a time."""
    x = np.random.default_rng(2).normal(size=(1, 3, 2, 6)).astype('f4')
    positions = np.array([[5, 0, 70]])
    found = np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions)))
    for place, position in enumerate(positions[0]):
        for i in range(3):
            angle = position * 10_000 ** (-i / 3)
            pair = x[0, place, :, i] + 1j * x[0, place, :, i + 3]
            turned = pair * complex(math.cos(angle), math.sin(angle))
            np.testing.assert_allclose(found[0, place, :, i], turned.real, atol=1e-4)
            np.testing.assert_allclose(found[0, place, :, i + 3], turned.imag, atol=1e-4)


def test_rotary_attention_depends_on_distances_only() -> None:
    """And without positions of tokens, it would not depend on their order at all."""
    model = Transformer(**SMALL, positions='rotary', tied=True)
    params = {'params': traverse_util.unflatten_dict(random_parameters(model), sep='/')}
    call = jax.jit(model.apply)
    places = np.arange(8)[None].repeat(2, 0)
    found, shifted, other = (
        call(params, TOKENS, positions=x) for x in (places, places + 100, places[:, ::-1])
    )
    np.testing.assert_allclose(found, shifted, atol=1e-4)
    np.testing.assert_allclose(found, call(params, TOKENS), atol=1e-6)
    assert np.abs(found - other).max() > 0.01


def test_tied_logits_are_products_with_the_embeddings() -> None:
    model = Transformer(**SMALL, tied=True)
    flat = random_parameters(model)
    assert not any(path.startswith('logits') for path in flat)
    params = {'params': traverse_util.unflatten_dict(flat, sep='/')}
    logits, state = model.apply(
        params, TOKENS, capture_intermediates=lambda module, _: module.name == 'norm',
        mutable=['intermediates'],
    )  # fmt: skip
    [last] = state['intermediates']['norm']['__call__']
    np.testing.assert_allclose(logits, last @ flat['tokens/embedding'].T, rtol=1e-4, atol=1e-5)
