# SPDX-License-Identifier: Apache-2.0
"""The bidirectional LSTM: padding, dropout of words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.models.bilstm import BiLSTM

MODEL = BiLSTM(vocab_size=12, width=4, hidden=8)
TOKENS = np.array([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0], [0, 0, 0, 0, 0]], 'i4')
VARIABLES = MODEL.init(jax.random.key(0), TOKENS)


@pytest.mark.slow
def test_padding_is_not_read() -> None:
    """A text alone, and one with more padding, have the same logits; an empty one has the bias."""
    params = {**VARIABLES['params']}
    params['head'] = {**params['head'], 'bias': jnp.ones(1)}
    logits = MODEL.apply({'params': params}, TOKENS)
    padded = MODEL.apply({'params': params}, np.pad(TOKENS, ((0, 0), (0, 3))))
    alone = MODEL.apply({'params': params}, TOKENS[1:2, :2])
    np.testing.assert_allclose(logits, padded, atol=1e-6)
    np.testing.assert_allclose(logits[1:2], alone, atol=1e-6)
    assert logits.shape == (3, 1) and logits[2, 0] == 1


def test_the_order_of_words_matters() -> None:
    """At both ends of a text: each direction reaches the head."""
    swapped = np.array([[3, 4, 5, 6, 7], [4, 3, 5, 6, 7], [3, 4, 5, 7, 6]], 'i4')
    logits = MODEL.apply(VARIABLES, swapped)
    assert np.abs(logits[1:] - logits[0]).min() > 1e-5


def test_word_dropout_is_that_of_training() -> None:
    """With all words dropped, a text is one of unknown words of its length."""
    model = MODEL.clone(word_dropout_rate=1.0)
    rngs = {'dropout': jax.random.key(1)}
    dropped = model.apply(VARIABLES, TOKENS, train=True, rngs=rngs)
    unknown = MODEL.apply(VARIABLES, np.where(TOKENS > 0, 1, 0))
    np.testing.assert_array_equal(dropped, unknown)
    kept = model.apply(VARIABLES, TOKENS)
    np.testing.assert_array_equal(kept, MODEL.apply(VARIABLES, TOKENS))
    assert not np.allclose(kept[:2], dropped[:2])
