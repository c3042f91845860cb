# SPDX-License-Identifier: Apache-2.0
"""The tagger: it does not read padding, and dropped words are unknown ones."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from trainer.models.tagger import Characters, Tagger

MODEL = Tagger(num_tags=3, num_words=20, num_characters=9, word_width=4, filters=4, hidden=4)
DRAW = np.random.default_rng(0)
LENGTHS = (5, 2, 4)
INPUTS = {
    'words': DRAW.integers(2, 20, (3, 5)).astype('i4'),
    'characters': DRAW.integers(1, 9, (3, 5, 6)).astype('i4'),
}
for row, length in enumerate(LENGTHS):
    INPUTS['words'][row, length:] = INPUTS['characters'][row, length:] = 0
VARIABLES = jax.jit(MODEL.init)(jax.random.key(1), INPUTS)


def logits(inputs: dict[str, Any], model: Any = MODEL, **options: Any) -> np.ndarray:
    return np.array(jax.jit(functools.partial(model.apply, **options))(VARIABLES, inputs))


def test_padding_is_not_read() -> None:
    """Neither that of sentences, in either direction, nor that of words."""
    whole = logits(INPUTS)
    for row, length in enumerate(LENGTHS[1:], 1):
        alone = logits({name: x[row : row + 1, :length] for name, x in INPUTS.items()})
        np.testing.assert_allclose(whole[row, :length], alone[0], atol=1e-6)
    characters = Characters(9, width=4, filters=4)
    short = np.array([[[3, 1, 4]]], 'i4')
    variables = jax.jit(characters.init)(jax.random.key(0), short)
    wide = np.pad(short, ((0, 0), (0, 0), (0, 4)))
    np.testing.assert_allclose(
        *(jax.jit(characters.apply)(variables, x) for x in (short, wide)), atol=1e-6
    )


def test_both_inputs_and_both_neighbors_matter() -> None:
    whole = logits(INPUTS)[0]
    for name in INPUTS:
        changed = {key: x.copy() for key, x in INPUTS.items()}
        changed[name][0, 2] = changed[name][0, 2] % 7 + 1
        assert (np.abs(logits(changed)[0] - whole).max(-1) > 1e-7).all(), name


@pytest.mark.slow
def test_dropped_words_are_unknown() -> None:
    """If all are dropped in training, only the characters are read."""
    model = MODEL.clone(word_dropout_rate=1.0)
    rngs = {'dropout': jax.random.key(0)}
    unknown = {**INPUTS, 'words': np.minimum(INPUTS['words'], 1)}
    np.testing.assert_array_equal(
        logits(INPUTS, model, train=True, rngs=rngs), logits(unknown, model)
    )
    np.testing.assert_array_equal(logits(INPUTS, model), logits(INPUTS))


@pytest.mark.slow
@pytest.mark.parametrize(('left_out', 'part'), [('word_width', 'words'), ('filters', 'characters')])
def test_either_input_can_be_left_out(left_out: str, part: str) -> None:
    model = MODEL.clone(**{left_out: 0})
    params = jax.eval_shape(model.init, jax.random.key(0), INPUTS)['params']
    assert part in VARIABLES['params'] and part not in params
