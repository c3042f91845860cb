# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction: weights of tokens, and packed sequences."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from trainer.models.transformer import Transformer
from trainer.tasks import NextToken

MODEL = Transformer(vocab_size=11, layers=2, width=16, heads=2, max_length=12)
PACKED = NextToken(segments='tokens_segment_ids', positions='tokens_positions')


@pytest.fixture(scope='module')
def model() -> Any:
    params = meta.unbox(jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 12), jnp.int32)))
    return functools.partial(jax.jit(MODEL.apply), params)


@pytest.mark.slow
def test_packed_sequence_equals_the_sequence_alone(model: Any) -> None:
    """Its logits do not depend on its neighbors, and its positions begin at 0."""
    a, b = np.array([1, 2, 3, 4, 5]), np.array([6, 7, 8, 9])
    row = {
        'tokens': np.concatenate([a, b, np.zeros(3, np.int64)])[None],
        'tokens_segment_ids': np.array([[1] * 5 + [2] * 4 + [0] * 3]),
        'tokens_positions': np.array([[*range(5), *range(4), 0, 0, 0]]),
    }
    packed = PACKED(model, {name: jnp.asarray(x) for name, x in row.items()})
    for sequence, start in ((a, 0), (b, 5)):
        alone = NextToken()(model, {'tokens': jnp.asarray(sequence[None])})
        stop = start + len(sequence) - 1
        np.testing.assert_allclose(packed.loss[0, start:stop], alone.loss[0, :-1], rtol=1e-5)
    assert packed.weights is not None
    np.testing.assert_array_equal(packed.weights[0], [1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0])


@pytest.mark.slow
def test_targets_are_the_next_tokens(model: Any) -> None:
    tokens = jnp.asarray([[1, 2, 3, 4], [4, 3, 2, 1]])
    output = NextToken()(model, {'tokens': tokens})
    logits = np.asarray(model(tokens), np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(scores[:, :-1], np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(output.loss[:, :-1], expected, rtol=1e-4)
    np.testing.assert_array_equal(output.weights, [[1, 1, 1, 0]] * 2)
    hits = logits[:, :-1].argmax(-1) == np.asarray(tokens)[:, 1:]
    np.testing.assert_array_equal(output.metrics['accuracy'][:, :-1], hits)


@pytest.mark.parametrize('shape', [(2,), (2, 4)])
def test_weights_per_sequence_or_per_token(shape: tuple[int, ...], model: Any) -> None:
    given = jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape)
    batch = {'tokens': jnp.ones((2, 4), jnp.int32), 'w': given}
    output = NextToken(weight='w')(model, batch)
    expected = np.broadcast_to(np.asarray(given).reshape(2, -1), (2, 4)) * [1, 1, 1, 0]
    np.testing.assert_array_equal(output.weights, expected)


@pytest.mark.slow
def test_targets_of_their_own(model: Any) -> None:
    """No token is without a target, and metrics get the fields."""
    whole = jnp.asarray([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    batch = {'a': whole[:, :-1], 'b': whole[:, 1:], 'words': jnp.array([2, 3])}
    output = NextToken(tokens='a', targets='b', fields=('words',))(model, batch)
    expected = NextToken()(model, {'tokens': whole})
    np.testing.assert_allclose(output.loss, expected.loss[:, :-1], rtol=1e-5)
    np.testing.assert_array_equal(output.weights, np.ones((2, 4)))
    np.testing.assert_array_equal(output.metrics['words'], [2, 3])
    assert list(output.checks) == ['b']


def test_mistakes() -> None:
    with pytest.raises(ValueError, match='targets: not available with segments'):
        NextToken(targets='b', segments='c')
    for fields in ('words', ('words', 'logits')):
        with pytest.raises(ValueError, match='fields: expected batch keys, such as'):
            NextToken(fields=fields)  # type: ignore[arg-type]


@pytest.mark.slow
def test_predictions(model: Any) -> None:
    tokens = jnp.asarray([[1, 2, 3, 4]])
    predicted = NextToken().predict(model, {'tokens': tokens})
    np.testing.assert_array_equal(predicted['next'], model(tokens).argmax(-1))
