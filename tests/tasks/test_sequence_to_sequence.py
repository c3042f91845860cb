# SPDX-License-Identifier: Apache-2.0
"""The task of a translator: its loss, and the search for targets."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer.config.errors import UserError
from trainer.models.beam_search import beam_search
from trainer.models.decoding import without_cache
from trainer.models.translator import Translator
from trainer.modules.ensemble import EnsembleModel
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys
from trainer.tasks import SequenceToSequence

MODEL = Translator(vocab_size=7, layers=1, width=8, heads=2)
SOURCES = jnp.array([[3, 4, 5, 1], [6, 2, 1, 0], [2, 2, 5, 1]])
TARGETS = jnp.array([[4, 5, 3, 6, 1], [5, 1, 0, 0, 0], [6, 6, 3, 1, 0]])
BATCH = {'sources': SOURCES, 'targets': TARGETS}
PARAMS: Any = nn.meta.unbox(jax.jit(MODEL.init)(jax.random.key(3), SOURCES, TARGETS))['params']
# A fresh model has nearly the same logits for all tokens.
PARAMS = jax.tree.map(lambda x: 3 * x, PARAMS)


def bind(mode: Any = 'eval', **options: Any) -> Any:
    keys = Keys(seed=0, mode=mode, step=jnp.int32(0))
    return as_functional(MODEL.clone(**options)).bind({'params': PARAMS}, keys)


@pytest.mark.parametrize(('mode', 'smoothing'), [('train', 0.2), ('eval', 0.0)])
def test_the_loss_is_that_of_the_next_token(mode: str, smoothing: float) -> None:
    """Smoothed in training only."""
    output = SequenceToSequence(label_smoothing=0.2)(bind(mode), BATCH)
    inputs = np.pad(TARGETS, ((0, 0), (1, 0)))[:, :-1]
    logits = MODEL.apply({'params': PARAMS}, SOURCES, inputs)
    labels = optax.smooth_labels(jax.nn.one_hot(TARGETS, 7), smoothing)
    expected = optax.softmax_cross_entropy(logits, labels)
    np.testing.assert_allclose(output.loss, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(output.weights, TARGETS != 0)
    hits = np.asarray(logits.argmax(-1) == TARGETS)
    np.testing.assert_array_equal(output.metrics['accuracy'][TARGETS != 0], hits[TARGETS != 0])


def test_targets_are_padded_with_any_number() -> None:
    """The embedding of one that is no token is NaN."""
    others = {**BATCH, 'targets': jnp.where(TARGETS == 0, 99, TARGETS)}
    outputs = [
        SequenceToSequence(padding=padding)(bind(), batch)
        for padding, batch in ((0, BATCH), (99, others))
    ]
    counted = TARGETS != 0
    np.testing.assert_array_equal(outputs[0].loss[counted], outputs[1].loss[counted])
    np.testing.assert_array_equal(outputs[1].weights, counted)


def predict(beams: int, **options: Any) -> dict[str, Any]:
    task = SequenceToSequence(search=beam_search, beams=beams, extra_tokens=2, **options)
    return jax.jit(lambda: task.predict(bind(decode=True), BATCH))()


def logits_of(inputs: jax.Array) -> jax.Array:
    """Returns the logits of each token, by the model that is trained."""
    sources = jnp.repeat(SOURCES, len(inputs) // len(SOURCES), axis=0)
    return MODEL.apply({'params': PARAMS}, sources, inputs)


def test_the_search_finds_what_it_finds_without_a_cache() -> None:
    def extend(tokens: jax.Array, cache: Any) -> Any:
        return without_cache(logits_of, len(tokens), 6)[0](tokens, cache)

    start = jnp.zeros((3, 1), jnp.int32)
    options: dict[str, Any] = {'count': 6, 'beams': 3, 'stop': 1, 'length_penalty': 0.5}
    _, cache = without_cache(logits_of, 3, 6)
    search = jax.jit(lambda: beam_search(extend, cache, start, batch_dims=0, **options))
    expected, found = search(), predict(3, length_penalty=0.5)
    np.testing.assert_array_equal(found['tokens'], expected.tokens[:, 0])
    np.testing.assert_allclose(found['score'], expected.scores[:, 0], rtol=1e-4)
    assert len(np.unique(found['tokens'], axis=0)) == 3


def test_one_beam_takes_the_most_probable_token() -> None:
    inputs = np.zeros((3, 7), np.int32)
    model = jax.jit(logits_of)
    for i in range(6):
        inputs[:, i + 1] = model(inputs)[:, i].argmax(-1)
    greedy = inputs[:, 1:]
    is_after_end = np.cumsum(greedy == 1, axis=1) - (greedy == 1) > 0
    np.testing.assert_array_equal(predict(1)['tokens'], np.where(is_after_end, 0, greedy))


def test_fields_are_kept() -> None:
    task = SequenceToSequence(search=beam_search, extra_tokens=0, keep=('targets',))
    found = jax.eval_shape(lambda batch: task.predict(bind(decode=True), batch), BATCH)
    assert found['tokens'].shape == (3, 4) and found['targets'].shape == TARGETS.shape


def test_an_ensemble_has_the_mean_of_the_probabilities() -> None:
    """And writes no targets: encodings have no mean."""
    params = jax.tree.map(lambda x: jnp.stack([x, -x]), PARAMS)
    task = SequenceToSequence(search=beam_search)
    keys = Keys(seed=0, mode='eval', step=jnp.int32(0))
    model = EnsembleModel(
        as_functional(MODEL), {'params': params}, keys, jnp.arange(2), combine=task.combine
    )
    found = jax.jit(lambda batch: task(model, batch).loss)(BATCH)
    members = [
        SequenceToSequence()(as_functional(MODEL).bind({'params': one}, keys), BATCH).loss
        for one in (PARAMS, jax.tree.map(lambda x: -x, PARAMS))
    ]
    expected = -jnp.log(jnp.exp(-jnp.stack(members)).mean(0))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(UserError, match=r'^SequenceToSequence: .*not a member of an ensemble'):
        task.predict(model, BATCH)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match='predictions need a search: set search of the task'):
        SequenceToSequence().predict(bind(decode=True), BATCH)
    with pytest.raises(UserError, match=r'no collection cache: .*dict\(decode=True\)'):
        SequenceToSequence(search=beam_search).predict(bind(), BATCH)
    for options in ({'beams': 0}, {'extra_tokens': -1}, {'label_smoothing': 1}, {'keep': 'x'}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SequenceToSequence(**options)  # type: ignore[arg-type]
