# SPDX-License-Identifier: Apache-2.0
"""The translator: what each token may depend on, and the cache."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from trainer.models.translator import Translator, encode_positions

MODEL = Translator(vocab_size=11, layers=2, width=8, heads=2)
DECODER = MODEL.clone(decode=True)
SOURCES = np.array([[3, 4, 5, 6, 1, 0], [7, 8, 1, 0, 0, 0], [2, 9, 4, 1, 0, 0]])
INPUTS = np.array([[0, 5, 6, 7, 3], [0, 6, 2, 8, 9], [0, 4, 4, 3, 2]])
CREATED = nn.meta.unbox(jax.jit(DECODER.init)(jax.random.key(0), SOURCES, INPUTS))
PARAMS, CACHE = {'params': CREATED['params']}, CREATED['cache']
apply = jax.jit(MODEL.apply)


def logits(sources: Any = SOURCES, inputs: Any = INPUTS) -> np.ndarray:
    return np.array(apply(PARAMS, sources, inputs))


@jax.jit
def extend(tokens: Any, cache: Any) -> tuple[jax.Array, Any]:
    """Returns the logits after tokens, and the new cache."""
    encoded = DECODER.apply(PARAMS, SOURCES, method='encode')
    given = {**PARAMS, 'cache': cache}
    found, state = DECODER.apply(given, tokens, encoded, method='extend', mutable=['cache'])
    return found, state['cache']


def extend_in_parts(parts: list[int], cache: Any = CACHE) -> tuple[np.ndarray, Any]:
    """Returns the logits of calls with so many tokens each, and the last cache."""
    found = []
    for tokens in np.split(INPUTS, np.cumsum(parts)[:-1], axis=1):
        part, cache = extend(tokens, cache)
        found.append(part)
    return np.concatenate(found, axis=1), cache


@pytest.mark.parametrize('parts', [[1] * 5, [2, 3]])
def test_the_cache_changes_nothing(parts: list[int]) -> None:
    found, cache = extend_in_parts(parts)
    np.testing.assert_allclose(found, logits(), atol=1e-5)
    assert cache['positions']['index'].tolist() == [5, 5, 5]


def test_each_example_has_its_own_place_in_the_cache() -> None:
    """Tokens that were read too early are overwritten, in one example only."""
    whole, cache = extend_in_parts([3, 2])
    cache = {**cache, 'positions': {'index': np.array([5, 2, 5], np.int32)}}
    again, _ = extend(np.array([[0], [INPUTS[1, 2]], [0]]), cache)
    np.testing.assert_allclose(again[1, 0], whole[1, 2], atol=1e-5)


def test_padding_of_the_source_is_not_read() -> None:
    whole = logits()
    for row, length in enumerate((SOURCES != 0).sum(1)):
        alone = logits(SOURCES[row : row + 1, :length], INPUTS[row : row + 1])
        np.testing.assert_allclose(whole[row], alone[0], atol=1e-5)


def test_a_token_depends_on_the_source_and_the_tokens_before() -> None:
    whole = logits()
    later = INPUTS.copy()
    later[:, 3] = later[:, 3] % 9 + 1
    changed = np.abs(logits(inputs=later) - whole).max(-1) > 1e-6
    assert not changed[:, :3].any() and changed[:, 3:].all()
    other = SOURCES.copy()
    other[:, 0] = other[:, 0] % 9 + 1
    assert (np.abs(logits(other) - whole).max(-1) > 1e-6).all()
    # The order of the source's tokens matters, too.
    other = SOURCES.copy()
    other[:, :2] = other[:, 1::-1]
    assert (np.abs(logits(other) - whole).max(-1) > 1e-6).all()


def test_one_table_of_embeddings() -> None:
    """It is that of source, target and output."""
    vocabulary = [x.shape for x in jax.tree.leaves(PARAMS) if 11 in x.shape]
    assert vocabulary == [(11, 8)]


def test_encodings_of_positions() -> None:
    found = encode_positions(np.array([[0, 3, 500]]), 4)
    assert found.shape == (1, 3, 4)
    angles = np.outer([0, 3, 500], [1, 1 / 100])
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_dimensions_have_names() -> None:
    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), SOURCES, INPUTS)
    specs = nn.get_partition_spec(boxed)['params']
    layer = specs['decoder_0']
    assert tuple(layer['source_attention']['query']['kernel']) == ('embed', 'heads')
    assert tuple(layer['attention']['inputs']['key']['kernel']) == ('embed', 'heads')
    assert tuple(layer['mlp_out']['kernel']) == ('mlp', 'embed')
    assert tuple(specs['embed']['embedding']) == ('vocab', 'embed')


@pytest.mark.parametrize(('width', 'heads'), [(8, 3), (8, 0), (9, 3)])
def test_a_width_that_does_not_fit(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f'width={width}: expected an even number that heads'):
        Translator(vocab_size=11, width=width, heads=heads)


def test_padding_may_be_any_number() -> None:
    """Also one without an embedding."""
    for padding in (10, 99, -1):
        model = MODEL.clone(padding=padding)
        sources = np.where(SOURCES == 0, padding, SOURCES)
        found = jax.jit(model.apply)(PARAMS, sources, INPUTS)
        np.testing.assert_array_equal(found, logits())
    # 0 is then a token as any other.
    other = jax.jit(MODEL.clone(padding=10).apply)(PARAMS, SOURCES, INPUTS)
    assert not np.allclose(other, logits())
